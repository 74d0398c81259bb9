"""All-to-all in XLA: rows gathered into equal shares, `lax.all_to_all`, scattered.

The meaning of the operation, on any platform. Each rank has room for `pair_rows` rows
for each other rank, used or not, and the row that each goes to travels beside it.

Shape suffixes: M entries, A copies of a row, N ranks, S slots for one rank, C rows
received.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.all_to_all.route import Axis


def send_rows(
  values: Sequence[jax.Array],
  address_MA: jax.Array,
  count: jax.Array,
  received: jax.Array,
  rows: int,
  axis: Axis,
  source_M: jax.Array | None = None,
) -> list[jax.Array]:
  """As `kernels_pallas.all_to_all.send_rows`; rows that nobody sends to are 0."""
  del received
  ranks = lax.axis_size(axis)
  entry_M = jnp.arange(len(address_MA), dtype=jnp.int32)
  source_M = entry_M if source_M is None else source_M
  address_MA = jnp.where(entry_M[:, None] < count, address_MA, -1)
  rank_MA = jnp.where(address_MA < 0, ranks, address_MA // rows)
  slots = min(address_MA.size, rows)  # no more rows can find room on one rank
  rank_P = rank_MA.reshape(-1)
  before_PN = jnp.cumsum(rank_P[:, None] == jnp.arange(ranks), axis=0) - 1
  slot_P = jnp.take_along_axis(
    before_PN, jnp.minimum(rank_P, ranks - 1)[:, None], axis=1
  )[:, 0]

  def in_shares(value_MA, empty):
    value_P = jnp.broadcast_to(value_MA, rank_MA.shape).reshape(-1)
    empty_NS = jnp.full((ranks, slots), empty, jnp.int32)
    return empty_NS.at[rank_P, slot_P].set(value_P, mode="drop")

  def exchange(x_NSW):
    out_NSW = lax.all_to_all(x_NSW, axis, 0, 0)
    return out_NSW.reshape(ranks * slots, *x_NSW.shape[2:])

  source_NS = in_shares(source_M[:, None], len(values[0]))
  target_Z = exchange(in_shares(address_MA % rows, rows))

  def send(value_MW):
    bits_MW = _as_bits(value_MW)
    arrived_ZW = exchange(bits_MW.at[source_NS].get(mode="fill", fill_value=0))
    empty_CW = jnp.zeros((rows, *value_MW.shape[1:]), bits_MW.dtype)
    out_CW = empty_CW.at[target_Z].set(arrived_ZW, mode="drop")
    return lax.bitcast_convert_type(out_CW, value_MW.dtype)

  return [send(value) for value in values]


def _as_bits(x: jax.Array) -> jax.Array:
  """Integers of the same width: XLA may canonicalise NaNs of narrow floats."""
  return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
