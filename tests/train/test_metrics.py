"""Counts, FLOPs, metrics.jsonl and plots against numbers worked out elsewhere."""

import dataclasses
import json

import numpy as np
import pytest

from deepseek_jax import presets
from deepseek_jax.train import metrics, plots


def test_flops_per_token_of_the_papers():
  """ISCA paper, table 2: 250 GFLOP for V3 and 155 for V2 at 4,096 tokens."""
  assert metrics.flops_per_token(presets.V3, 4096) == pytest.approx(250.5e9, rel=2e-4)
  assert metrics.flops_per_token(presets.V2, 4096) == pytest.approx(155.3e9, rel=2e-4)


@pytest.mark.parametrize(
  ("model", "billions"),
  [
    (presets.V3, 37.55),
    (presets.V2, 21.38),
    (presets.V2_LITE, 2.661),
    (presets.MOE_16B, 2.829),
  ],
  ids=lambda value: getattr(value, "name", ""),
)
def test_active_parameters_with_embedding(model, billions):
  found = metrics.active_parameters(model) + model.vocab_size * model.dim
  assert found / 1e9 == pytest.approx(billions, abs=0.005)


def test_active_parameters_are_those_of_the_model():
  """All experts active: everything in the tiny model but embedding and MTP."""
  import jax

  from deepseek_jax.model.layers import RouterBias, named_variables
  from deepseek_jax.model.transformer import Transformer

  model = dataclasses.replace(
    presets.TINY, n_mtp_layers=0, n_activated_experts=16, n_limited_groups=4
  )
  shapes = jax.eval_shape(lambda: Transformer(model, jax.random.key(0)))
  total = sum(
    v.size
    for name, v in named_variables(shapes).items()
    if not isinstance(v, RouterBias) and name != "embed.weight"
  )
  assert metrics.active_parameters(model) == total


def test_max_violation():
  counts = np.array([[4, 4, 4, 4], [16, 0, 0, 0], [6, 4, 4, 2], [0, 0, 0, 0]])
  assert metrics.max_violation(counts) == [0.0, 3.0, 0.5, 0.0]
  assert metrics.max_violation(np.zeros((0, 8))) == []


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H200", 989e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU7x", 2307e12),
    ("TPU v5 lite", None),
    ("cpu", None),
  ],
)
def test_peaks(kind, peak):
  assert metrics.peak_flops(kind) == peak


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
  log = metrics.MetricsLog(tmp_path, 0)
  for step in range(1, 6):
    log.write({"step": step, "loss": float("nan") if step == 2 else 1 / step})
  log.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 6, "lo')  # killed while writing
  log = metrics.MetricsLog(tmp_path, 3)
  log.write({"step": 4, "loss": 0.5, "loads": [1.0, float("inf")]})
  log.close()
  lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert lines == metrics.read_metrics(tmp_path)
  assert [line["step"] for line in lines] == [1, 2, 3, 4]
  assert lines[1]["loss"] is None
  assert lines[2]["loss"] == 1 / 3
  assert lines[3]["loads"] == [1.0, None]


def test_no_metrics_yet(tmp_path):
  assert metrics.read_metrics(tmp_path) == []


def test_tensorboard_events(tmp_path):
  loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
  for first in (1, 3):  # the second run goes on after step 2
    log = metrics.MetricsLog(tmp_path, first - 1)
    for step in range(first, 5):
      log.write({"step": step, "loss": 10.0 * first + step, "max_vio_layers": [0.5]})
    log.sync()
    log.close()
  events = loader.EventAccumulator(str(tmp_path / "tensorboard"))
  events.Reload()
  found = [(event.step, event.value) for event in events.Scalars("train/loss")]
  assert found == [(1, 11.0), (2, 12.0), (3, 33.0), (4, 34.0)]


def test_plots_are_pictures(tmp_path):
  records = [
    {"tokens": 10 * i, "loss": 3.0 / i, "mtp_loss": None if i == 2 else 4.0 / i}
    for i in range(1, 5)
  ]
  records[-1]["validation_loss"] = 1.0
  plots.plot_losses(records, tmp_path / "plots" / "loss.png")
  plots.plot_losses([], tmp_path / "plots" / "empty.png")
  plots.plot_expert_load(np.arange(24).reshape(3, 8), tmp_path / "plots" / "load.png")
  for name in ("loss", "empty", "load"):
    assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
