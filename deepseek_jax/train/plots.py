"""PNG plots of a run: the loss curves, the load of every expert and of every GPU."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure


def plot_losses(records: list[dict[str, Any]], path: Path) -> None:
  """Loss, MTP loss and validation loss (nats a token) against tokens seen.

  Args:
    records: as in metrics.jsonl; fields that are absent or null are left out.
  """
  figure = Figure(figsize=(8, 5), layout="constrained")
  axis = figure.add_subplot()
  curves: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("loss", "training", {"linewidth": 1}),
    ("mtp_loss", "MTP", {"linewidth": 1, "alpha": 0.7}),
    ("validation_loss", "validation", {"marker": "o", "color": "black"}),
  )
  for name, label, style in curves:
    points = [(r["tokens"], r[name]) for r in records if r.get(name) is not None]
    if points:
      axis.plot(*zip(*points), label=label, **style)
  axis.set(xlabel="tokens", ylabel="loss (nats a token)")
  axis.grid(alpha=0.3)
  if axis.has_data():
    axis.legend()
  _save(figure, path)


def plot_expert_load(load_LE: np.ndarray, path: Path) -> None:
  """Load of every expert (column) in every layer (row), as multiples of the mean."""
  load = np.asarray(load_LE, np.float64)
  relative = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
  height = 1.5 + 0.25 * len(load)
  figure = Figure(figsize=(8, height), layout="constrained")
  axis = figure.add_subplot()
  image = axis.imshow(
    relative, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest"
  )
  axis.set(xlabel="expert", ylabel="MoE layer", yticks=range(len(load)))
  figure.colorbar(image, label="load / mean load")
  _save(figure, path)


def plot_gpu_load(loads: dict[str, np.ndarray], path: Path) -> None:
  """Load of every GPU (column) in every layer (row) under several placements.

  Args:
    loads: [layers, GPUs] by the placement's name; drawn side by side, as multiples of
      the layer's mean, with the fullest GPU's mean over layers in the title.
  """
  relative = {}
  for name, load_LG in loads.items():
    load_LG = np.asarray(load_LG, np.float64)
    relative[name] = load_LG / np.maximum(load_LG.mean(axis=1, keepdims=True), 1e-9)
  layers = len(next(iter(relative.values())))
  figure = Figure(figsize=(9, 1.8 + 0.25 * layers), layout="constrained")
  axes = figure.subplots(1, len(relative), sharey=True, squeeze=False)[0]
  span = max(np.abs(load_LG - 1).max() for load_LG in relative.values())
  colours = ScalarMappable(Normalize(1 - span, 1 + span), "RdBu_r")
  for axis, (name, load_LG) in zip(axes, relative.items()):
    image = colours.to_rgba(load_LG)
    axis.imshow(image, aspect="auto", interpolation="nearest")
    axis.set(xlabel="GPU", title=f"{name}: max / mean {load_LG.max(1).mean():.2f}")
  axes[0].set(ylabel="MoE layer", yticks=range(layers))
  figure.colorbar(colours, ax=axes, label="load / mean load")
  _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  FigureCanvasAgg(figure).print_figure(path, dpi=120)
