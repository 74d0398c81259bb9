"""Grouped matrix product in XLA, for CPU: a loop over experts and blocks of rows.

Each expert's rows are taken in blocks; the last block of a group may reach into the
next group, and a mask discards what it finds there. So nothing is padded, memory does
not grow with the number of blocks, and rows of no group cost nothing. (Batching the
blocks into one einsum with gathered weights was as fast at 128 rows a block, needs
groups padded to that, and slower below.)

Shapes: Z rows, E experts (groups), D input, F output, R rows of one block.
"""

import jax
import jax.numpy as jnp
from jax import lax

ROW_MULTIPLE = 8
_MASKED_ROWS = 8  # of a block: groups of a capacity are mostly empty


def multiply(
  x_ZD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, transpose_w: bool = False
) -> jax.Array:
  """Row z of group e becomes x_z @ w_e (or @ w_e^T); rows of no group become 0."""
  starts_E = jnp.cumsum(sizes_E) - sizes_E
  block = _block_rows(x_ZD.shape[0], w_EDF.shape[0])
  return _multiply(x_ZD, w_EDF, starts_E, sizes_E, block, transpose_w)


def multiply_masked(
  x_GCD: jax.Array, w_GDF: jax.Array, counts_G: jax.Array, transpose_w: bool = False
) -> jax.Array:
  """The first counts_G rows of each group times its matrix, 0 in the others."""
  groups, capacity, depth = x_GCD.shape
  starts_G = jnp.arange(groups) * capacity
  block = min(_MASKED_ROWS, groups * capacity)
  x_ZD = x_GCD.reshape(-1, depth)
  y_ZF = _multiply(x_ZD, w_GDF, starts_G, counts_G, block, transpose_w)
  return y_ZF.reshape(groups, capacity, -1)


def _multiply(x_ZD, w_EDF, starts_E, sizes_E, block, transpose_w):
  """Groups from rows `starts_E` on, each times its matrix; 0 in rows between them."""
  rows, experts = x_ZD.shape[0], w_EDF.shape[0]
  columns = w_EDF.shape[1 if transpose_w else 2]
  equation = "rf,df->rd" if transpose_w else "rd,df->rf"

  def expert(e, y_ZF):
    # A matrix that nobody asks for is not even widened.
    return lax.cond(sizes_E[e] > 0, own_rows, lambda e, y_ZF: y_ZF, e, y_ZF)

  def own_rows(e, y_ZF):
    w_DF = w_EDF[e].astype(jnp.float32)

    def one_block(i, y_ZF):
      first, end = starts_E[e], starts_E[e] + sizes_E[e]
      start, mine_R = _block(i, first, end, block, rows)
      x_RD = lax.dynamic_slice_in_dim(x_ZD, start, block).astype(jnp.float32)
      y_RF = _product(equation, x_RD, w_DF).astype(y_ZF.dtype)
      old_RF = lax.dynamic_slice_in_dim(y_ZF, start, block)
      y_RF = jnp.where(mine_R[:, None], y_RF, old_RF)
      return lax.dynamic_update_slice_in_dim(y_ZF, y_RF, start, 0)

    return lax.fori_loop(0, (sizes_E[e] + block - 1) // block, one_block, y_ZF)

  return lax.fori_loop(0, experts, expert, jnp.zeros((rows, columns), x_ZD.dtype))


def multiply_rows(
  x_ZD: jax.Array, dy_ZF: jax.Array, sizes_E: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
  """For each group the sum over its rows of x^T dy, [E, D, F]; 0 for empty groups."""
  rows, experts = x_ZD.shape[0], sizes_E.shape[0]
  block = _block_rows(rows, experts)
  end_E = jnp.cumsum(sizes_E)

  def expert(e):
    def one_block(i, dw_DF):
      start, mine_R = _block(i, end_E[e] - sizes_E[e], end_E[e], block, rows)
      x_RD = lax.dynamic_slice_in_dim(x_ZD, start, block)
      dy_RF = lax.dynamic_slice_in_dim(dy_ZF, start, block)
      x_RD = jnp.where(mine_R[:, None], x_RD, 0).astype(jnp.float32)
      dy_RF = jnp.where(mine_R[:, None], dy_RF, 0).astype(jnp.float32)
      return dw_DF + _product("rd,rf->df", x_RD, dy_RF)

    zero_DF = jnp.zeros((x_ZD.shape[1], dy_ZF.shape[1]), jnp.float32)
    blocks = (sizes_E[e] + block - 1) // block
    return lax.fori_loop(0, blocks, one_block, zero_DF).astype(dtype)

  return lax.map(expert, jnp.arange(experts))


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """In full FP32, also where a GPU would round dequantised operands to TF32."""
  return jnp.einsum(equation, x, y, precision=lax.Precision.HIGHEST)


def _block_rows(rows: int, experts: int) -> int:
  """Rows of a block: about half a mean group, a power of two from 8 to 128."""
  half_mean = rows // experts // 2
  return min(rows, max(8, min(128, 1 << half_mean.bit_length())))


def _block(i, start, end, block: int, rows: int) -> tuple[jax.Array, jax.Array]:
  """First row of the group's i-th block, and which of its rows are the block's own.

  A block that would run past the last row is moved back to end there.
  """
  wanted = start + i * block
  first = jnp.minimum(wanted, rows - block)
  row_R = first + jnp.arange(block)
  return first, (row_R >= wanted) & (row_R < end)
