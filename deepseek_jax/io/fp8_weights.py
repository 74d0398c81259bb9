"""FP8 weights of checkpoints back to what they stand for: code times block scale.

DeepSeek-V3 report, section 3.3, and `weight_dequant` of the released code: the product
is taken in FP32 and rounded once. Blocks are 128x128 of Hugging Face's [out, in], so
scales of gate and up, side by side with us, have a block edge between the two.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from deepseek_jax.io.hf_names import SCALE, TILE, Place
from kernels_pallas.quantize import quantize_blocks

FP8 = jnp.float8_e4m3fn
VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
VALUES = VALUES.astype(np.float32)  # of the 256 codes; NumPy converts them slowly


def dequantise_tensor(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """FP32 [out, in] of a checkpoint's tensor; scale [ceil(out/128), ceil(in/128)]."""
  out, in_ = codes.shape
  wide = np.repeat(np.repeat(scale, TILE, axis=1)[:, :in_], TILE, axis=0)[:out]
  return VALUES[codes.view(np.uint8)] * wide


def dequantise_arrays(
  arrays: Mapping[str, jax.Array], places: Iterable[Place], dtype: Any
) -> dict[str, jax.Array]:
  """Our parameters without scales: codes become `dtype`, the rest stays as it is.

  Args:
    arrays: by path; `PATH.scale` beside FP8 codes, as `hf_import` keeps them.
    places: of the model's tensors, from `hf_places`.
  """
  widths: dict[str, dict[int, int]] = {}
  of_path: dict[str, Place] = {}
  for place in places:
    widths.setdefault(place.path, {})[place.start] = place.body[-1]
    of_path[place.path] = place
  found = {}
  for path, array in arrays.items():
    if path.endswith(SCALE):
      continue
    if path + SCALE in arrays:
      halves = len(widths[path])
      stacked, ins = len(of_path[path].index), of_path[path].ins
      scale = arrays[path + SCALE]
      array = _dequantise(array, scale, stacked, ins, halves, jnp.dtype(dtype))
    found[path] = array
  return found


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _dequantise(codes, scale, stacked: int, ins: int, halves: int, dtype):
  body = codes.shape[stacked:]
  in_, out = math.prod(body[:ins]), math.prod(body[ins:])
  width = out // halves  # columns that share their blocks
  columns = np.arange(width) // TILE
  columns = np.concatenate([columns + i * -(-width // TILE) for i in range(halves)])
  rows = np.arange(in_)[:, None] // TILE
  flat = codes.reshape(*codes.shape[:stacked], in_, out).astype(jnp.float32)
  return (flat * scale[..., rows, columns]).astype(dtype).reshape(codes.shape)


def quantise_arrays(
  arrays: Mapping[str, jax.Array], places: Iterable[Place], power_of_two: bool
) -> dict[str, jax.Array]:
  """The inverse of `dequantise_arrays`: codes, and scales beside them.

  Weights that V3's releases have in FP8 are quantised, by the same blocks; others and
  what is FP8 already stay as they are.
  """
  starts: dict[str, set[int]] = {}
  of_path: dict[str, Place] = {}
  for place in places:
    starts.setdefault(place.path, set()).add(place.start)
    of_path[place.path] = place
  found = dict(arrays)
  for path, array in arrays.items():
    place = of_path.get(path)
    if place is None or not place.fp8 or path + SCALE in arrays:
      continue
    found[path], found[path + SCALE] = _quantise(
      array, len(place.index), place.ins, len(starts[path]), power_of_two
    )
  return found


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantise(array, stacked: int, ins: int, halves: int, power_of_two: bool):
  stack, body = array.shape[:stacked], array.shape[stacked:]
  in_, out = math.prod(body[:ins]), math.prod(body[ins:])
  width = out // halves

  def one(flat):  # a layer's or an expert's weight
    parts = [flat[:, i * width : (i + 1) * width] for i in range(halves)]
    done = [quantize_blocks(part, power_of_two=power_of_two)[0] for part in parts]
    codes, scales = zip(*done)
    return jnp.concatenate(codes, axis=1), jnp.concatenate(scales, axis=1)

  codes, scales = jax.lax.map(one, array.reshape(-1, in_, out))
  return codes.reshape(array.shape), scales.reshape(*stack, *scales.shape[1:])
