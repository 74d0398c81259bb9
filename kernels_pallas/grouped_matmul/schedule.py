"""Tables that tell a GPU kernel which matrix a block of 128 rows is multiplied by.

Shapes: E groups, m blocks of rows, G groups of a fixed capacity.
"""

import jax
import jax.numpy as jnp

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


def tall(sizes_E: jax.Array, rows: int, warpgroups: int) -> jax.Array:
  """[3, m]: of blocks of `warpgroups` x 64 rows, cut anew in each group.

  Group, first row / 64, and how many warpgroups have rows of that group, 0 in blocks
  that are not needed. What follows the last group is a group E. Full blocks come first:
  lower ones, which take less time, even out the load at the end.
  """
  units_E1 = jnp.append(sizes_E, rows - sizes_E.sum()) // WARPGROUP_ROWS
  blocks_E1 = -(-units_E1 // warpgroups)
  experts, end_E1 = sizes_E.shape[0], jnp.cumsum(blocks_E1)
  most = (rows // WARPGROUP_ROWS + (warpgroups - 1) * (experts + 1)) // warpgroups
  block_m = jnp.arange(most)
  group_m = jnp.searchsorted(end_E1, block_m, side="right", method="compare_all")
  group_m = jnp.minimum(group_m, experts)
  inside_m = (block_m - (end_E1 - blocks_E1)[group_m]) * warpgroups
  first_m = (jnp.cumsum(units_E1) - units_E1)[group_m] + inside_m
  filled_m = jnp.clip(units_E1[group_m] - inside_m, 0, warpgroups)
  first_m = jnp.where(filled_m > 0, first_m, 0)
  blocks_3m = jnp.stack([group_m, first_m, filled_m]).astype(jnp.int32)
  return blocks_3m[:, jnp.argsort(-filled_m)]


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
