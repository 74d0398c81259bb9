"""Where each token's copies go on other ranks, and where they come home.

A bin is a run of rows in some rank's receive buffer: the whole buffer for training and
prefill (`plan_ranks`), one local expert's share for decoding (`plan_experts`). Within a
bin, rows stand by source rank, then by token, without gaps: the order of DeepEP's
receive buffers (github.com/deepseek-ai/DeepEP). All ranks learn all counts first, N x B
integers, and compute every place from them; no place travels with a row.

Static shapes bound the buffers. What exceeds a bound is not sent, and `overflow` says
so, on every rank alike.

Shape suffixes: M tokens, A copies of a token at most, N ranks, L bins of one rank,
B = N x L bins, C rows of a receive buffer, P rows of a home buffer.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Route:
  """A plan of one exchange and of its way back, on one rank.

  An address is rank * (rows of its buffer) + row, or -1 for nothing.
  """

  address_MA: jax.Array  # of each copy, in the receive buffers
  home_MA: jax.Array  # row of each copy in this rank's home buffer, -1 for none
  return_C: jax.Array  # address of each received row, in the home buffers
  counts_L: jax.Array  # rows received in each bin of this rank
  counts_NB: jax.Array  # rows that each rank has for each bin, bounds ignored
  overflow: jax.Array  # bool: some rank's bound was exceeded
  rows: int = dataclasses.field(metadata={"static": True})  # of a receive buffer
  home_rows: int = dataclasses.field(metadata={"static": True})
  axis: str = dataclasses.field(metadata={"static": True})


def plan_ranks(
  ranks_MA: jax.Array, rows: int, axis: str, home_rows: int | None = None
) -> Route:
  """Each token once to each rank that it names, however often it names it.

  Args:
    ranks_MA: int32 destination of each of a token's choices, negative for none.
    rows: rows of a receive buffer; at most N x M are ever needed.
    axis: mesh axis, inside `jax.shard_map`.
    home_rows: rows of a home buffer; None takes what can never overflow.
  """
  ranks = lax.axis_size(axis)
  tokens, choices = ranks_MA.shape
  if ranks <= choices:  # a column a rank: what names a rank twice falls together
    named_MN = (ranks_MA[:, :, None] == jnp.arange(ranks)).any(1)
    bins_MA = jnp.where(named_MN, jnp.arange(ranks), -1)
  else:
    same_MAA = ranks_MA[:, :, None] == ranks_MA[:, None, :]
    earlier_AA = jnp.tril(jnp.ones((choices, choices), bool), -1)
    bins_MA = jnp.where((same_MAA & earlier_AA).any(-1), -1, ranks_MA)
  home_rows = home_rows or tokens * bins_MA.shape[1]
  return _plan(bins_MA, 1, rows, home_rows, axis)


def plan_experts(
  experts_MA: jax.Array, local_experts: int, capacity: int, axis: str
) -> Route:
  """Each token once to each of its experts: receive buffers [local experts, capacity].

  Args:
    experts_MA: int32 experts over all ranks, distinct within a token, negative for
      none; rank r holds experts r * local_experts and following.
    local_experts: experts of one rank.
    capacity: rows of one expert; all ranks' tokens always suffice.
    axis: mesh axis, inside `jax.shard_map`.
  """
  return _plan(experts_MA, local_experts, capacity, experts_MA.size, axis)


def _plan(bins_MA, local, bin_rows, home_rows, axis) -> Route:
  ranks, me = lax.axis_size(axis), lax.axis_index(axis)
  bins = ranks * local
  rows = local * bin_rows
  if max(rows, home_rows) * ranks >= 2**31:
    raise ValueError(
      f"all_to_all addresses are int32: {ranks} buffers of {max(rows, home_rows)} rows "
      "are too many, lower the bound"
    )
  hits_MB = (bins_MA[:, :, None] == jnp.arange(bins)).any(1)
  seen_MB = jnp.cumsum(hits_MB, axis=0, dtype=jnp.int32)
  counts_NB = lax.all_gather(seen_MB[-1], axis)
  home_start_NB = jnp.cumsum(counts_NB, axis=1, dtype=jnp.int32) - counts_NB
  before_NB = jnp.cumsum(counts_NB, axis=0, dtype=jnp.int32) - counts_NB

  valid_MA = (bins_MA >= 0) & (bins_MA < bins)
  bins_MA = jnp.where(valid_MA, bins_MA, 0)
  index_MA = jnp.take_along_axis(seen_MB, bins_MA, axis=1) - 1
  row_MA = before_NB[me][bins_MA] + index_MA
  valid_MA &= row_MA < bin_rows
  row_MA += bins_MA % local * bin_rows
  address_MA = jnp.where(valid_MA, bins_MA // local * rows + row_MA, -1)
  home_MA = home_start_NB[me][bins_MA] + index_MA
  home_MA = jnp.where(valid_MA & (home_MA < home_rows), home_MA, -1)

  mine = me * local + jnp.arange(local)
  before_NL, counts_NL = before_NB[:, mine], counts_NB[:, mine]
  total_L = counts_NL.sum(0, dtype=jnp.int32)
  return Route(
    address_MA=address_MA,
    home_MA=home_MA,
    return_C=_return(
      before_NL, total_L, home_start_NB[:, mine], bin_rows, home_rows
    ).reshape(-1),
    counts_L=jnp.minimum(total_L, bin_rows),
    counts_NB=counts_NB,
    overflow=(counts_NB.sum(0) > bin_rows).any() | (counts_NB.sum(1) > home_rows).any(),
    rows=rows,
    home_rows=home_rows,
    axis=axis,
  )


def _return(before_NL, total_L, home_start_NL, bin_rows, home_rows):
  """Home address of each row of each local bin."""
  row = jnp.arange(bin_rows, dtype=jnp.int32)

  def of_bin(before_N, total, home_start_N):
    source = jnp.searchsorted(before_N, row, side="right", method="compare_all") - 1
    place = home_start_N[source] + row - before_N[source]
    known = (row < total) & (place < home_rows)
    return jnp.where(known, source * home_rows + place, -1).astype(jnp.int32)

  return jax.vmap(of_bin, in_axes=(1, 0, 1))(before_NL, total_L, home_start_NL)
