"""Tables that tell a GPU kernel which matrix a block of 128 rows is multiplied by.

Shapes: E groups, m blocks of 128 rows, G groups of a fixed capacity.
"""

import jax
import jax.numpy as jnp

BLOCK_ROWS = 128


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
