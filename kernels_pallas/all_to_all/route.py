"""Where each token's copies go on other ranks, and where they come home.

A bin is a run of rows in some rank's receive buffer: the whole buffer for training and
prefill (`plan_ranks`), one local expert's share for decoding (`plan_experts`). Within a
bin, rows stand by source rank, then by token, without gaps: the order of DeepEP's
receive buffers (github.com/deepseek-ai/DeepEP). All ranks learn all counts first, N x B
integers, and compute every place from them; no place travels with a row.

Static shapes bound the buffers. What exceeds a bound is not sent, and `overflow` says
so, on every rank alike.

Shape suffixes: M tokens, A copies of a token at most, N ranks, L bins of one rank,
B = N x L bins, C rows of a receive buffer, R rows that go home from one rank at most.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

Axis = str | tuple[str, ...]  # of the mesh; of several the first is the slowest


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Route:
  """A plan of one exchange and of its way back, on one rank.

  An address is rank * (rows of its buffer) + row, or -1 for nothing.
  """

  address_MA: jax.Array  # of each copy, in the receive buffers
  home_MA: jax.Array  # row of each copy in this rank's home buffer, -1 for none
  return_R: jax.Array  # address, in the home buffers, of what goes home from here
  source_R: jax.Array | None  # its row in the receive buffer; None: row by row
  counts_L: jax.Array  # rows received in each bin of this rank
  counts_NB: jax.Array  # rows that each rank has for each bin, bounds ignored
  overflow: jax.Array  # bool: some rank's bound was exceeded
  rows: int = dataclasses.field(metadata={"static": True})  # of a receive buffer
  home_rows: int = dataclasses.field(metadata={"static": True})
  axis: Axis = dataclasses.field(metadata={"static": True})

  def is_filled(self) -> jax.Array:
    """[C] bool: whether a row of the receive buffer holds anything."""
    bins = self.counts_L.shape[0]
    row = jnp.arange(self.rows // bins)
    return (row < self.counts_L[:, None]).reshape(-1)


def plan_ranks(
  ranks_MA: jax.Array, rows: int, axis: Axis, home_rows: int | None = None
) -> Route:
  """Each token once to each rank that it names, however often it names it.

  Args:
    ranks_MA: int32 destination of each of a token's choices, negative for none.
    rows: rows of a receive buffer; at most N x M are ever needed.
    axis: mesh axis, or several as one, inside `jax.shard_map`.
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
  experts_MA: jax.Array, local_experts: int, capacity: int, axis: Axis
) -> Route:
  """Each token once to each of its experts: receive buffers [local experts, capacity].

  Args:
    experts_MA: int32 experts over all ranks, distinct within a token, negative for
      none; rank r holds experts r * local_experts and following.
    local_experts: experts of one rank.
    capacity: rows of one expert; all ranks' tokens always suffice.
    axis: mesh axis, or several as one, inside `jax.shard_map`.
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
  counts_L = jnp.minimum(counts_NB[:, mine].sum(0, dtype=jnp.int32), bin_rows)
  most = min(rows, ranks * bins_MA.shape[0] * min(bins_MA.shape[1], local))
  return_R, source_R = _way_home(
    before_NB[:, mine], counts_L, home_start_NB[:, mine], bin_rows, home_rows, most
  )
  return Route(
    address_MA=address_MA,
    home_MA=home_MA,
    return_R=return_R,
    source_R=source_R if local > 1 else None,
    counts_L=counts_L,
    counts_NB=counts_NB,
    overflow=(counts_NB.sum(0) > bin_rows).any() | (counts_NB.sum(1) > home_rows).any(),
    rows=rows,
    home_rows=home_rows,
    axis=axis,
  )


def _way_home(before_NL, counts_L, home_start_NL, bin_rows, home_rows, most):
  """Home address and row of everything received here, bin after bin without gaps."""
  j_R = jnp.arange(most, dtype=jnp.int32)
  end_L = jnp.cumsum(counts_L, dtype=jnp.int32)
  bin_R = jnp.searchsorted(end_L, j_R, side="right", method="compare_all")
  bin_R = jnp.minimum(bin_R, end_L.shape[0] - 1).astype(jnp.int32)
  within_R = j_R - (end_L - counts_L)[bin_R]
  rank_R = (before_NL.T[bin_R] <= within_R[:, None]).sum(1, dtype=jnp.int32) - 1
  place_R = home_start_NL[rank_R, bin_R] + within_R - before_NL[rank_R, bin_R]
  known_R = (j_R < end_L[-1]) & (place_R < home_rows)
  address_R = jnp.where(known_R, rank_R * home_rows + place_R, -1)
  return address_R, jnp.where(known_R, bin_R * bin_rows + within_R, 0)
