"""Hugging Face checkpoints into sharded arrays: tensor by tensor, shard by shard.

The host builds one shard of one (stacked) parameter at a time, by several threads that
each copy one tensor out of the memory map, transposed and converted, and hands it to
its device. So the host holds one shard, and on a CPU the arrays themselves; a device
gets its own part only, and of the files only that part is read.

FP8 weights become codes times scale, rounded once to the type asked for, or stay as
they are (`load_arrays(dtype=FP8)`): then a parameter is `{path: codes, path + ".scale":
FP32}`, see hf_names.py. DeepSeek-V3 report, section 3.3; `weight_dequant` of the
released code gives the same bits.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from deepseek_jax.dense_config import DenseConfig
from deepseek_jax.io.fp8_weights import FP8, VALUES
from deepseek_jax.io.hf_check import Source, open_checkpoint
from deepseek_jax.io.hf_names import SCALE, TILE, AnyConfig, Place, our_shapes
from deepseek_jax.io.safetensors import SafetensorsError
from deepseek_jax.model.dense import DenseTransformer
from deepseek_jax.model.layers import is_variable, named_variables
from deepseek_jax.model.transformer import Transformer

_THREADS = min(16, os.cpu_count() or 1)
_ROWS = 128  # transposed at once: a run of them is four cache lines of BF16
_UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

Model = Transformer | DenseTransformer


def load(
  folder: str | Path,
  mesh: Mesh | None = None,
  dtype: Any = jnp.bfloat16,
  *,
  config: AnyConfig | None = None,
  max_seq_len: int | None = None,
  progress: bool = True,
) -> tuple[Any, Any]:
  """A released checkpoint as a model that computes, and its config.

  Args:
    folder: with config.json and safetensors.
    mesh: where the model shall lie, split as in compute; None: on the first device.
    dtype: of the weights; norms and routers are FP32 in any case.
    config: in place of config.json.
    max_seq_len: the longest sequence, in place of the config's.

  Returns:
    A `Transformer` or `DenseTransformer`, and its `ModelConfig` or `DenseConfig`.

  Raises:
    FileNotFoundError, SafetensorsError, ValueError: one line; see `open_checkpoint`.
  """
  source = open_checkpoint(folder, config, max_seq_len)
  skeleton = make_skeleton(source.config)
  arrays = load_arrays(source, compute_targets(skeleton, mesh, dtype), progress)
  return assemble(skeleton, arrays), source.config


def make_skeleton(config: AnyConfig) -> Model:
  """The model's module with `jax.ShapeDtypeStruct`s for arrays."""

  def make() -> Model:
    key = jax.random.key(0)
    if isinstance(config, DenseConfig):
      return DenseTransformer(config, key)
    return Transformer(config, key)

  return jax.eval_shape(make)


def assemble(skeleton: Any, arrays: dict[str, jax.Array]) -> Any:
  """The module with the arrays of the same paths."""
  variables = named_variables(skeleton)
  structure = jax.tree.structure(skeleton, is_leaf=is_variable)
  return jax.tree.unflatten(
    structure, [v.replace(arrays[path]) for path, v in variables.items()]
  )


def compute_targets(
  skeleton: Any, mesh: Mesh | None, dtype: Any
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape, dtype and place of each parameter of a model that computes."""
  targets = {}
  for path, v in named_variables(skeleton).items():
    meta = v.get_metadata()
    kind = jnp.float32 if meta.get("high_precision") else dtype
    targets[path] = jax.ShapeDtypeStruct(
      v.shape, kind, sharding=_sharding(mesh, meta["spec"])
    )
  return targets


def fp8_targets(source: Source, mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
  """As `compute_targets`, with FP8 weights kept as codes and scales.

  Raises:
    SafetensorsError: a stacked parameter is FP8 in part.
  """
  targets = compute_targets(make_skeleton(source.config), mesh, jnp.bfloat16)
  kept: dict[str, bool] = {}
  scales = []
  for name, place in source.places.items():
    fp8 = source.is_fp8(name)
    if kept.setdefault(place.path, fp8) != fp8:
      raise SafetensorsError(
        f"{source.folder.file_of(name).path}: {name} is "
        f"{'' if fp8 else 'not '}FP8, unlike the other layers of {place.path}: import "
        "with dtype=bfloat16"
      )
    if fp8:
      scales.append(place.scale)
  shapes = our_shapes(scales)
  for place in scales:
    weight = targets[place.path.removesuffix(SCALE)]
    targets[weight_path := place.path.removesuffix(SCALE)] = jax.ShapeDtypeStruct(
      weight.shape, FP8, sharding=weight.sharding
    )
    spec = P()
    if isinstance(targets[weight_path].sharding, NamedSharding):
      spec = P(*weight.sharding.spec[: len(place.index)])
    shape = shapes[place.path]
    targets[place.path] = jax.ShapeDtypeStruct(
      shape, jnp.float32, sharding=_sharding(mesh, spec)
    )
  return targets


def _sharding(mesh: Mesh | None, spec: P):
  if mesh is None:
    return SingleDeviceSharding(jax.devices()[0])
  return NamedSharding(mesh, spec)


def load_arrays(
  source: Source, targets: dict[str, jax.ShapeDtypeStruct], progress: bool = True
) -> dict[str, jax.Array]:
  """The arrays that `targets` describe, by path.

  Weights are converted to the dtype of their target. A target of dtype FP8 takes FP8
  weights as they are, and its scales stand under a target of their own.

  Raises:
    SafetensorsError: a scale that is none.
  """
  parts: dict[str, list[tuple[str, Place]]] = {path: [] for path in targets}
  for name, place in source.places.items():
    if place.copy:
      continue
    if place.path in parts:
      parts[place.path].append((name, place))
    if place.ins and place.scale.path in parts:
      parts[place.scale.path].append((name, place.scale))
  total = sum(math.prod(t.shape) * t.dtype.itemsize for t in targets.values())
  with (
    ThreadPoolExecutor(_THREADS, thread_name_prefix="import") as pool,
    tqdm(
      total=total,
      unit="B",
      unit_scale=True,
      desc=source.folder.path.name,
      disable=not progress or jax.process_index() != 0,
      dynamic_ncols=True,
    ) as bar,
  ):
    return {
      path: _make_array(source, target, parts[path], pool, bar)
      for path, target in targets.items()
    }


def _make_array(
  source: Source,
  target: jax.ShapeDtypeStruct,
  parts: list[tuple[str, Place]],
  pool: ThreadPoolExecutor,
  bar: Any,
) -> jax.Array:
  """One parameter: each distinct shard is built once and put on its devices."""
  where: dict[tuple[tuple[int, int], ...], list[Any]] = {}
  indices = target.sharding.addressable_devices_indices_map(target.shape)
  for device, index in indices.items():
    assert index is not None  # a device of this process
    spans = tuple(s.indices(n)[:2] for s, n in zip(index, target.shape))
    where.setdefault(spans, []).append(device)
  shards = []
  for spans, devices in where.items():
    host = np.empty([stop - start for start, stop in spans], target.dtype)
    jobs = [
      pool.submit(_copy_tensor, host, spans, source, name, place)
      for name, place in parts
    ]
    try:
      for job in jobs:
        job.result()
        bar.update(host.nbytes / len(jobs))
    finally:
      for job in jobs:
        job.cancel()
    shards += [jax.device_put(host, device) for device in devices]
    jax.block_until_ready(shards)
  return jax.make_array_from_single_device_arrays(target.shape, target.sharding, shards)


def _copy_tensor(
  host: np.ndarray,
  spans: tuple[tuple[int, int], ...],
  source: Source,
  name: str,
  place: Place,
) -> None:
  """Writes what one tensor has of the shard that lies at `spans` of its parameter."""
  stacked = len(place.index)
  at = [i - start for i, (start, _) in zip(place.index, spans)]
  if any(not 0 <= i < n for i, n in zip(at, host.shape)):
    return
  spans = spans[stacked:]
  low, high = spans[-1]
  first, last = max(low, place.start), min(high, place.start + place.body[-1])
  if first >= last:
    return
  part = host[tuple(at)][..., first - low : last - low]
  cut = [slice(*span) for span in spans[:-1]]
  cut.append(slice(first - place.start, last - place.start))
  if place.path.endswith(SCALE):
    _copy(part, source.read_scale(name), None, place, cut)
    return
  source.folder.will_read(name)
  fp8 = source.is_fp8(name) and host.dtype != FP8
  scale = source.read_scale(name) if fp8 else None
  _copy(part, source.folder.read(name), scale, place, cut)
  source.folder.release(name)


def _copy(
  part: np.ndarray,
  tensor: np.ndarray,
  scale: np.ndarray | None,
  place: Place,
  cut: list[slice],
) -> None:
  """part = the cut of the tensor as ours: transposed, in `part`'s dtype.

  `part` and `cut` have the axes of `place.body`.
  """
  body, ins = place.body, place.ins
  if not ins:
    part[...] = tensor.reshape(body)[tuple(cut)]
    return
  turned = part.transpose(*range(ins, len(body)), *range(ins))  # outs, then ins
  raw = tensor.reshape(body[ins:] + body[:ins])
  rows = np.arange(place.shape[0]).reshape(body[ins:]) // TILE
  ins_cut, (first, *rest) = tuple(cut[:ins]), cut[ins:]
  factors = None if scale is None else _widen(scale, place, ins_cut)
  step = max(1, _ROWS // math.prod(body[ins + 1 :]))
  for start in range(first.start, first.stop, step):
    stop = min(start + step, first.stop)
    outs_cut = (slice(start, stop), *rest)
    block = raw[outs_cut + ins_cut]
    if factors is not None:
      block = VALUES[block.view(np.uint8)]
      block *= factors[rows[outs_cut]]
    _assign(turned[start - first.start : stop - first.start], block)


def _widen(scale: np.ndarray, place: Place, ins_cut: tuple[slice, ...]) -> np.ndarray:
  """The scales of each row of blocks, one number for each of its columns."""
  wide = np.repeat(scale, TILE, axis=1)[:, : place.shape[1]]
  return wide.reshape(len(scale), *place.body[: place.ins])[:, *ins_cut]


def _assign(part: np.ndarray, block: np.ndarray) -> None:
  """part[...] = block; bytes alone where the types agree, which NumPy copies faster."""
  block = block.astype(part.dtype, copy=False)
  kind = _UINT[part.dtype.itemsize]
  part.view(kind)[...] = block.view(kind)
