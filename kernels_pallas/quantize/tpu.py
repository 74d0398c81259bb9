"""1x128 and 128x1 tiles on TPU: one Pallas kernel for rows, columns, or both.

A grid step has up to 512x512 elements in vector memory, writes codes and scales of each
of their tiles, and transposes what goes to columns in FP32, before the cast; Mosaic's
pipeline overlaps the copies. The rest of the package is left to XLA here.

Shapes: M rows, K columns; a lower-case letter is that dimension divided by 128.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.quantize import reference
from kernels_pallas.quantize.reference import TILE, Quantized


def unsupported(*matrices: jax.Array, **_: bool) -> str | None:
  """Why this kernel cannot quantise these matrices, or None when it can."""
  for x in matrices:
    if x.size == 0 or x.shape[0] % TILE or x.shape[1] % TILE:
      return f"needs dimensions that are multiples of {TILE}, got {list(x.shape)}"
  return None


def quantize_rows(x_MK, power_of_two, dtype, rows=None, interpret=False) -> Quantized:
  [out] = _quantize(x_MK, (True, False), power_of_two, dtype, rows, interpret)
  return out


def quantize_columns(
  x_MK, power_of_two, dtype, rows=None, interpret=False
) -> Quantized:
  [out] = _quantize(x_MK, (False, True), power_of_two, dtype, rows, interpret)
  return out


def quantize_both(
  x_MK, power_of_two, dtype, rows=None, interpret=False
) -> tuple[Quantized, Quantized]:
  by_rows, by_columns = _quantize(
    x_MK, (True, True), power_of_two, dtype, rows, interpret
  )
  return by_rows, by_columns


def _quantize(
  x_MK, directions: tuple[bool, bool], power_of_two, dtype, rows, interpret
) -> list[Quantized]:
  """Quantises along rows and along columns, whichever is wanted."""
  if rows is not None:
    x_MK = jnp.where(jnp.arange(x_MK.shape[0])[:, None] < rows, x_MK, 0)
  M, K = x_MK.shape
  R, C = _block(M), _block(K)
  out_shape, out_specs = [], []
  if directions[0]:
    out_shape.append(jax.ShapeDtypeStruct((M, K), dtype))
    out_specs.append(pl.BlockSpec((R, C), lambda i, j: (i, j)))
    out_shape.append(jax.ShapeDtypeStruct((K // TILE, 1, M), jnp.float32))
    out_specs.append(pl.BlockSpec((C // TILE, 1, R), lambda i, j: (j, 0, i)))
  if directions[1]:
    out_shape.append(jax.ShapeDtypeStruct((K, M), dtype))
    out_specs.append(pl.BlockSpec((C, R), lambda i, j: (j, i)))
    out_shape.append(jax.ShapeDtypeStruct((M // TILE, 1, K), jnp.float32))
    out_specs.append(pl.BlockSpec((R // TILE, 1, C), lambda i, j: (i, 0, j)))

  def body(x_ref, *out_refs):
    refs = list(out_refs)
    for transposed, wanted in enumerate(directions):
      if wanted:
        _write(x_ref, refs.pop(0), refs.pop(0), bool(transposed), power_of_two)

  results = pl.pallas_call(
    body,
    grid=(M // R, K // C),
    in_specs=[pl.BlockSpec((R, C), lambda i, j: (i, j))],
    out_specs=out_specs,
    out_shape=out_shape,
    interpret=interpret,
  )(x_MK)
  return [(q, s[:, 0]) for q, s in zip(results[::2], results[1::2])]


def _write(x_ref, q_ref, s_ref, transposed: bool, power_of_two: bool) -> None:
  """Codes and scales of every tile of the block in one direction."""
  limit, axis = float(jnp.finfo(q_ref.dtype).max), 0 if transposed else 1
  for t in range(x_ref.shape[axis] // TILE):
    at = slice(t * TILE, (t + 1) * TILE)
    x = (x_ref[at, :] if transposed else x_ref[:, at]).astype(jnp.float32)
    magnitude = jnp.expand_dims(reference.amax(x, axis), axis)
    s = reference.scales(magnitude, limit, power_of_two)
    q = jnp.clip(reference.divide(x, s), -limit, limit)
    q_ref[:, at] = (q.T if transposed else q).astype(q_ref.dtype)
    s_ref[t] = s if transposed else s.T


def _block(size: int) -> int:
  """The largest number of elements up to 512 that divides a dimension."""
  return next(block for block in (512, 256, 128) if size % block == 0)
