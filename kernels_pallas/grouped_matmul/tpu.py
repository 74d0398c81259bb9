"""Grouped matrix product on TPU: megablox, which ships with JAX, with tiles by shape.

megablox leaves rows of no group unwritten, so they are zeroed here. FP32 operands are
multiplied at the matrix unit's default precision.

Shapes: Z rows, E experts (groups), D input, F output.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

ROW_MULTIPLE = 128
_LANES = 128


def unsupported(dtype: jax.typing.DTypeLike, d: int, f: int) -> str | None:
  """Why these kernels cannot multiply so, or None when they can."""
  if dtype not in (jnp.bfloat16, jnp.float32):
    return f"multiplies bfloat16 and float32 only, got {jnp.dtype(dtype).name}"
  if d % _LANES or f % _LANES:
    return f"needs D and F that are multiples of {_LANES}, got D={d}, F={f}"
  return None


def multiply(
  x_ZD: jax.Array,
  w_EDF: jax.Array,
  sizes_E: jax.Array,
  transpose_w: bool = False,
  interpret: bool = False,
) -> jax.Array:
  """Row z of group e becomes x_z @ w_e (or @ w_e^T); rows of no group become 0."""
  rows, depth = x_ZD.shape
  columns = w_EDF.shape[1 if transpose_w else 2]
  widest = 2048 // x_ZD.dtype.itemsize
  y_ZF = gmm(
    x_ZD,
    w_EDF,
    sizes_E.astype(jnp.int32),
    preferred_element_type=x_ZD.dtype,
    tiling=(
      _row_tile(rows, w_EDF.shape[0]),
      _tile(depth, widest),
      _tile(columns, widest),
    ),
    transpose_rhs=transpose_w,
    interpret=interpret,
  )
  return jnp.where(jnp.arange(rows)[:, None] < sizes_E.sum(), y_ZF, 0)


def multiply_rows(
  x_ZD: jax.Array,
  dy_ZF: jax.Array,
  sizes_E: jax.Array,
  dtype: jax.typing.DTypeLike,
  interpret: bool = False,
) -> jax.Array:
  """For each group the sum over its rows of x^T dy, [E, D, F]; 0 for empty groups."""
  rows, d = x_ZD.shape
  widest = 2048 // x_ZD.dtype.itemsize
  return tgmm(
    x_ZD.T,
    dy_ZF,
    sizes_E.astype(jnp.int32),
    preferred_element_type=jnp.dtype(dtype),
    tiling=(
      _row_tile(rows, sizes_E.shape[0]),
      _tile(d, widest // 2),
      _tile(dy_ZF.shape[1], widest),
    ),
    interpret=interpret,
  )


def _row_tile(rows: int, experts: int) -> int:
  """Rows of a tile: at most a quarter of a mean group, for a tile that straddles two
  groups is multiplied for each; a divisor of all rows, as megablox demands."""
  for tile in (512, 256):
    if rows % tile == 0 and rows >= 4 * tile * experts:
      return tile
  if rows % 128:
    raise ValueError(f"grouped_matmul on TPU needs Z a multiple of 128, got {rows}")
  return 128


def _tile(size: int, widest: int) -> int:
  """The widest tile that pads `size` by less than an eighth."""
  for tile in range(min(widest, size), _LANES, -_LANES):
    if -size % tile < size / 8:
      return tile
  return _LANES
