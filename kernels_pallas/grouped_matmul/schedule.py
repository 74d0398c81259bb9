"""Tables that tell a GPU kernel which matrix a block of 128 rows is multiplied by.

Shapes: E groups, m blocks of rows, G groups of a fixed capacity.
"""

import jax
import jax.numpy as jnp
from jax import lax

BLOCK_ROWS = 128
WARPGROUP_ROWS = 64


def contiguous(sizes_E: jax.Array, rows: int) -> jax.Array:
  """[1, m]: the group of each block where groups stand one after the other.

  Sizes are multiples of 128; E for blocks after the last group.
  """
  blocks = -(-rows // BLOCK_ROWS)
  group_m = jnp.searchsorted(
    jnp.cumsum(sizes_E),
    jnp.arange(blocks) * BLOCK_ROWS,
    side="right",
    method="compare_all",
  )
  return group_m.astype(jnp.int32)[None]


def bands(sizes_E: jax.Array, rows: int, most: int) -> jax.Array:
  """[3, m]: as `contiguous`, and the first block and the number of those of its band.

  A band is what is multiplied by the same columns of a matrix before the next columns:
  all blocks of a group, or an equal share of them, up to `most`, which is even. So a
  group's matrix comes from memory once, or few times. Bands have an even number of
  blocks, a group's last excepted. What follows the last group is a group E.
  """
  blocks = -(-rows // BLOCK_ROWS)
  used_E = sizes_E.astype(jnp.int32) // BLOCK_ROWS
  blocks_F = jnp.append(used_E, blocks - used_E.sum())
  end_F = jnp.cumsum(blocks_F)
  block_m = jnp.arange(blocks)
  group_m = jnp.sum(end_F <= block_m[:, None], axis=1)
  start_m, blocks_m = (end_F - blocks_F)[group_m], blocks_F[group_m]
  bands_m = -(-blocks_m // most)
  each_m = 2 * -(-blocks_m // (2 * bands_m))
  before_m = (block_m - start_m) // each_m * each_m
  count_m = jnp.minimum(each_m, blocks_m - before_m)
  return jnp.stack([group_m, start_m + before_m, count_m]).astype(jnp.int32)


def pair_in_band(i, count, across: int, second):
  """Those of one of the i-th two tiles of a band, and whether both have one column.

  They do, so that they need the same of the group's matrix; but of the last block of an
  odd number two tiles lie side by side. `across` is even.
  """
  pairs = lax.div(count, 2)
  down = jnp.maximum(pairs, 1)
  beside = i - pairs * across
  is_column = beside < 0
  row = jnp.where(is_column, 2 * lax.rem(i, down) + second, count - 1)
  column = jnp.where(is_column, lax.div(i, down), 2 * beside + second)
  return row, column, is_column


def tall(sizes_E: jax.Array, rows: int) -> jax.Array:
  """[3, m]: of blocks of 192 rows, and of 128 where a group's rows are no multiple.

  Group, first row / 64, and how many warpgroups of 64 rows have work: 3, 2, or 0 in
  blocks that are not needed, which come last. A group's lower blocks, at most two, come
  after its others; what follows the last group is a group E.

  Two blocks of 128 rows instead of 192 and 64: both fetch their columns of the group's
  matrix together, and one of 64 fetches as many for half the work. There is no sort,
  which would be more kernels: a product may take less than a millisecond.
  """
  experts = sizes_E.shape[0]
  rest = -(-(rows - sizes_E.sum()) // BLOCK_ROWS) * BLOCK_ROWS
  units_F = jnp.append(sizes_E, rest).astype(jnp.int32) // WARPGROUP_ROWS
  lower_F = -units_F % 3  # blocks of two units
  high_F = (units_F - 2 * lower_F) // 3
  counts_2F = jnp.stack([units_F, high_F + lower_F])
  end_2F = jnp.cumsum(counts_2F, axis=1)
  start_2F = end_2F - counts_2F
  block_m = jnp.arange(2 * (-(-rows // BLOCK_ROWS) + experts + 1) // 3)
  group_m = jnp.minimum(jnp.sum(end_2F[1] <= block_m[:, None], axis=1), experts)
  number_m = block_m - start_2F[1, group_m]  # in its group
  before_m = 3 * number_m - jnp.maximum(number_m - high_F[group_m], 0)
  first_m = start_2F[0, group_m] + before_m
  busy_m = jnp.where(number_m < high_F[group_m], 3, 2)
  is_needed_m = block_m < end_2F[1, -1]
  blocks_3m = jnp.stack([group_m, first_m, busy_m])
  blocks_3m = jnp.where(is_needed_m, blocks_3m, jnp.array([[experts], [0], [0]]))
  return blocks_3m.astype(jnp.int32)


def masked(counts_G: jax.Array, capacity: int) -> jax.Array:
  """[2, m]: group and filled rows of each block where groups have one capacity.

  G for blocks that hold nothing.
  """
  groups = counts_G.shape[0]
  blocks = -(-capacity // BLOCK_ROWS)
  start_m = jnp.tile(jnp.arange(blocks) * BLOCK_ROWS, groups)
  filled_m = jnp.repeat(counts_G, blocks) - start_m
  group_m = jnp.where(filled_m > 0, jnp.repeat(jnp.arange(groups), blocks), groups)
  return jnp.stack([group_m, filled_m]).astype(jnp.int32)


def spans(sizes_E: jax.Array) -> jax.Array:
  """[2, E]: first row and number of rows of each group."""
  return jnp.stack([jnp.cumsum(sizes_E) - sizes_E, sizes_E]).astype(jnp.int32)
