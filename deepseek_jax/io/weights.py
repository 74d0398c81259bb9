"""The weights of a workdir, whatever wrote them: a training run or an import.

They come back placed and typed as asked for: as a model that computes, to start
another run from, or to be exported. An import that kept FP8 has three parts in its
state: `fp8` (codes), `scales`, and `params` (the rest); else there is `params` alone,
and always `bias`.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import Config
from deepseek_jax.io import workdir as home
from deepseek_jax.io.checkpoint import Checkpoints, restore_newest
from deepseek_jax.io.fp8_weights import FP8, dequantise_arrays
from deepseek_jax.io.hf_export import Layout
from deepseek_jax.io.hf_import import make_skeleton
from deepseek_jax.io.hf_names import SCALE, AnyConfig, hf_places, our_shapes
from deepseek_jax.model.layers import RouterBias, named_variables

LAYOUT = "hf_layout.json"  # in the workdir of an import

Targets = dict[str, jax.ShapeDtypeStruct]
Arrays = dict[str, jax.Array]


def save_imported(
  workdir: Path, arrays: Arrays, skeleton: Any, loop: dict[str, Any]
) -> None:
  """Writes an import as checkpoint 0 of `workdir`, whole or not at all."""
  checkpoints = Checkpoints(workdir / "checkpoints", keep=1, asynchronous=False)
  bias = _biases(skeleton)
  kept = {path for path in arrays if path + SCALE in arrays}
  scales = {path for path in arrays if path.endswith(SCALE)}
  state = {
    "params": {p: a for p, a in arrays.items() if p not in kept | scales | bias},
    "bias": {p: a for p, a in arrays.items() if p in bias},
    "fp8": {p: a for p, a in arrays.items() if p in kept},
    "scales": {p: a for p, a in arrays.items() if p in scales},
  }
  try:
    checkpoints.save(0, {name: part for name, part in state.items() if part}, loop)
  finally:
    checkpoints.close()


def restore_weights(
  workdir: Path,
  skeleton: Any,
  targets: Targets,
  *,
  average: bool = False,
  keep_fp8: bool = False,
) -> tuple[int, Arrays]:
  """The newest checkpoint's step, and its weights by path.

  Args:
    skeleton: the model as `hf_import.make_skeleton` gives it.
    targets: shape, dtype and sharding of each parameter; numbers are rounded to them.
    average: the moving average of the weights instead.
    keep_fp8: give what an import kept in FP8 as codes and scales.

  Raises:
    FileNotFoundError: there is no checkpoint.
    ValueError: it is damaged, or has no average.
  """
  bias = _biases(skeleton)
  fp8 = _kept_fp8(workdir, skeleton.config)
  trained = home.read(workdir)
  if average and (trained.job == "import" or not trained.train.ema_decay):
    raise ValueError(
      f"{workdir} keeps no moving average of the weights: export them as they are, "
      "with checkpoint.average=False"
    )
  abstract: dict[str, Any] = {
    "params": {p: t for p, t in targets.items() if p not in bias and p not in fp8},
    "bias": {p: t for p, t in targets.items() if p in bias},
  }
  if fp8:
    abstract["fp8"] = {
      p: jax.ShapeDtypeStruct(t.shape, FP8, sharding=t.sharding)
      for p, t in targets.items()
      if p in fp8
    }
    abstract["scales"] = _scale_targets(skeleton.config, targets, fp8)
  wanted = {name: part for name, part in abstract.items() if part}
  if average:
    first = next(iter(abstract["params"]))
    wanted = {"params": {first: targets[first]}}
  found = restore_newest(
    workdir / "checkpoints", wanted, dict(targets) if average else None
  )
  if found is None:
    raise FileNotFoundError(
      f"{workdir} has no checkpoint yet: train there, or import into it, first"
    )
  if average:
    return found.step, dict(found.ema or {})
  arrays = {p: a for part in found.state.values() for p, a in part.items()}
  if fp8 and not keep_fp8:
    places = [p for p in hf_places(skeleton.config).values() if not p.copy]
    arrays = dequantise_arrays(arrays, places, jnp.float32)
    arrays = {
      p: jax.device_put(a.astype(targets[p].dtype), targets[p].sharding)
      for p, a in arrays.items()
    }
  return found.step, {p: arrays[p] for p in arrays if p in targets or keep_fp8}


def restore_start(config: Config, targets: Targets) -> Arrays:
  """The weights of the workdir `config.checkpoint.path`, for a new run.

  Raises:
    FileNotFoundError: no such workdir, or no checkpoint in it.
    ValueError: its model has other shapes.
  """
  source = Path(config.checkpoint.path)
  skeleton = make_skeleton(home.read(source).model)
  there = {path: v.shape for path, v in named_variables(skeleton).items()}
  for path, target in targets.items():
    if there.get(path) != target.shape:
      found = list(there[path]) if path in there else "absent"
      raise ValueError(
        f"checkpoint.path={source} holds another model: {path} is {found} there and "
        f"{list(target.shape)} here"
      )
  return restore_weights(source, skeleton, targets)[1]


def _biases(skeleton: Any) -> set[str]:
  named = named_variables(skeleton)
  return {path for path, v in named.items() if isinstance(v, RouterBias)}


def _kept_fp8(workdir: Path, config: AnyConfig) -> set[str]:
  """Paths of the parameters that the import in `workdir` kept in FP8."""
  trained = home.read(workdir)
  if trained.job != "import" or not trained.checkpoint.dtype.startswith("fp8"):
    return set()
  places = hf_places(config)
  layout = Layout.load(workdir / LAYOUT)
  specs = [spec for _, group in layout.files().values() for spec in group]
  return {
    places[s.name].path for s in specs if s.dtype == "F8_E4M3" and s.name in places
  }


def _scale_targets(config: AnyConfig, targets: Targets, paths: set[str]) -> Targets:
  places = [p for p in hf_places(config).values() if p.path in paths and not p.copy]
  stacked = {place.path: len(place.index) for place in places}
  found = {}
  for path, shape in our_shapes(place.scale for place in places).items():
    weight = path.removesuffix(SCALE)
    sharding = targets[weight].sharding
    if isinstance(sharding, NamedSharding):
      spec = P(*sharding.spec[: stacked[weight]])
      sharding = NamedSharding(sharding.mesh, spec)
    found[path] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
  return found
