"""Tokens to their experts and back (DeepSeek-V3 report, 3.2.2; DeepEP's contract).

A token travels once to each rank of the `expert` axis that holds one of its experts,
however many of them live there. On arrival it is copied into one row per expert;
rows of one expert stand together, each group padded to a multiple of rows that the
grouped matrix product wants. Gates travel along and are applied by the expert, so
combine is a plain sum, and combine and dispatch are each other's transpose.

Static shapes need bounds: `capacity` times the balanced load, for the tokens sent to
one rank and for the rows of one rank. `overflow` says that a bound was exceeded and
the result is wrong; the step is then not applied and is retried with a larger bound.
`capacity=inf` cannot overflow; a single rank needs no bound at all.

Shape suffixes: M tokens, D model, E experts, A active experts a token, N ranks,
S slots (places in the send buffer, N x bound), Z rows.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name


def _float0(x: jax.Array) -> np.ndarray:
  return np.zeros(x.shape, jax.dtypes.float0)


@jax.custom_vjp
def spread(x_MD: jax.Array, source_Z: jax.Array, target_MA: jax.Array) -> jax.Array:
  """Copies tokens into rows: rows[z] = x[source[z]], 0 where source is M or more.

  `target_MA` says the same from the token's side: the rows that token m is copied
  to, negative for none. With both, neither direction needs a scatter.
  """
  del target_MA
  return x_MD.at[source_Z].get(mode="fill", fill_value=0)


@jax.custom_vjp
def gather_sum(rows_ZD: jax.Array, source_Z: jax.Array, target_MA: jax.Array):
  """The transpose of `spread`: out[m] = sum of rows[target[m]], in FP32 inside."""
  del source_Z
  # Negative targets would count from the end; the row past the end is a zero.
  target_MA = jnp.where(target_MA < 0, rows_ZD.shape[0], target_MA)
  wide = jnp.promote_types(rows_ZD.dtype, jnp.float32)
  out = jnp.zeros((target_MA.shape[0], rows_ZD.shape[1]), wide)
  for a in range(target_MA.shape[1]):
    out += rows_ZD.at[target_MA[:, a]].get(mode="fill", fill_value=0).astype(wide)
  return out.astype(rows_ZD.dtype)


def _spread_fwd(x, source, target):
  return spread(x, source, target), (source, target)


def _spread_bwd(plan, g):
  source, target = plan
  return gather_sum(g, source, target), _float0(source), _float0(target)


def _gather_sum_fwd(rows, source, target):
  return gather_sum(rows, source, target), (source, target)


def _gather_sum_bwd(plan, g):
  source, target = plan
  return spread(g, source, target), _float0(source), _float0(target)


spread.defvjp(_spread_fwd, _spread_bwd)
gather_sum.defvjp(_gather_sum_fwd, _gather_sum_bwd)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Plan:
  """Where everything went: what `combine` needs to bring it back."""

  row_source_Z: jax.Array  # slot (or token) of each row; past the end for padding
  slot_rows_SA: jax.Array  # rows of each slot (or token), -1 for none
  slot_source_S: jax.Array | None = None  # token of each slot; None on one rank
  token_slots_MA: jax.Array | None = None  # slots of each token, -1 for none
  axis: str | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dispatched:
  rows_ZD: jax.Array  # grouped by local expert, zero where padded
  gates_Z: jax.Array
  group_sizes_E: jax.Array  # rows of each local expert, padding included
  overflow: jax.Array  # bool: a bound was exceeded on this rank
  plan: Plan


def dispatch(
  x_MD: jax.Array,
  experts_MA: jax.Array,
  gates_MA: jax.Array,
  *,
  n_experts: int,
  row_multiple: int,
  capacity: float = math.inf,
  axis: str | None = None,
) -> Dispatched:
  """Brings each token to the ranks of its experts and lines rows up by expert.

  Args:
    x_MD: this rank's tokens.
    experts_MA: chosen experts over all ranks, distinct within a token.
    gates_MA: their weights, FP32.
    n_experts: of all ranks; rank r holds the r-th contiguous share.
    row_multiple: groups of rows are padded to a multiple of it.
    capacity: bound of slots and rows as a multiple of the balanced load.
    axis: name of the mesh axis that experts are split over; None for one rank.
  """
  ranks = lax.axis_size(axis) if axis else 1
  if ranks == 1:
    rows = experts_MA.size
    return _arrange(x_MD, experts_MA, gates_MA, n_experts, rows, row_multiple, None)
  local = n_experts // ranks
  m, active = experts_MA.shape
  slots = slot_bound(m, active, ranks, capacity)
  rank_MA = experts_MA // local
  first_MA = _first_occurrence(rank_MA)
  rank_MA = jnp.where(first_MA, rank_MA, ranks)
  token_slots_MA, counts_N = _positions(rank_MA, ranks, slots)
  slot_source_S = _invert(token_slots_MA, ranks * slots)

  def send(values_MX):
    return _exchange(spread(values_MX, slot_source_S, token_slots_MA), axis, ranks)

  arrived_SD = checkpoint_name(send(x_MD), "dispatched")
  gates_SA = send(gates_MA)
  # Empty slots arrive as zeros; experts are numbered from 1 on the way to tell.
  experts_SA = _exchange(
    (experts_MA + 1).at[slot_source_S].get(mode="fill", fill_value=0), axis, ranks
  )
  local_SA = experts_SA - 1 - lax.axis_index(axis) * local
  local_SA = jnp.where((local_SA >= 0) & (local_SA < local), local_SA, local)
  rows = row_bound(m, active, ranks, local, capacity)
  out = _arrange(arrived_SD, local_SA, gates_SA, local, rows, row_multiple, axis)
  out.plan.slot_source_S = slot_source_S
  out.plan.token_slots_MA = token_slots_MA
  out.overflow |= (counts_N > slots).any()
  return out


def combine(rows_ZD: jax.Array, plan: Plan) -> jax.Array:
  """Sums each token's rows, first where its experts live, then at home: [M, D]."""
  out = gather_sum(rows_ZD, plan.row_source_Z, plan.slot_rows_SA)
  if plan.slot_source_S is None:
    return out
  home = _exchange(out, plan.axis, lax.axis_size(plan.axis))
  return gather_sum(home, plan.slot_source_S, plan.token_slots_MA)


def slot_bound(m: int, active: int, ranks: int, capacity: float) -> int:
  """Slots for one rank: capacity x the share that uniform routing would send."""
  expected = m * (1 - (1 - 1 / ranks) ** active)
  return m if math.isinf(capacity) else min(m, math.ceil(capacity * expected))


def row_bound(m: int, active: int, ranks: int, local: int, capacity: float) -> int:
  """Rows of one rank, without the padding of groups."""
  worst = ranks * m * min(active, local)
  return worst if math.isinf(capacity) else min(worst, math.ceil(capacity * m * active))


def _arrange(x_SD, experts_SA, gates_SA, n_experts, rows, multiple, axis):
  """One row per (token, expert) pair, grouped by expert; expert n_experts is none."""
  rows = -(-(rows + n_experts * (multiple - 1)) // multiple) * multiple
  hits_SE = (experts_SA[..., None] == jnp.arange(n_experts)).any(1)
  rank_SE = jnp.cumsum(hits_SE, axis=0, dtype=jnp.int32)
  counts_E = rank_SE[-1]
  sizes_E = -(-counts_E // multiple) * multiple
  starts_E = jnp.cumsum(sizes_E, dtype=jnp.int32) - sizes_E
  place_SE = starts_E + rank_SE - 1
  safe_SA = jnp.minimum(experts_SA, n_experts - 1)
  rows_SA = jnp.take_along_axis(place_SE, safe_SA, axis=1)
  fits_SA = (experts_SA < n_experts) & (rows_SA < rows)
  rows_SA = checkpoint_name(jnp.where(fits_SA, rows_SA, -1), "plan")
  source_Z = checkpoint_name(_invert(rows_SA, rows), "plan")
  pair_Z = _invert(rows_SA.reshape(-1, 1), rows)
  overflow = sizes_E.sum() > rows
  # After an overflow the sizes must still fit the buffer: the result is discarded.
  sizes_E = jnp.clip(rows - starts_E, 0, sizes_E)
  return Dispatched(
    rows_ZD=spread(x_SD, source_Z, rows_SA),
    gates_Z=spread(gates_SA.reshape(-1, 1), pair_Z, rows_SA.reshape(-1, 1))[:, 0],
    group_sizes_E=checkpoint_name(sizes_E, "plan"),
    overflow=overflow,
    plan=Plan(row_source_Z=source_Z, slot_rows_SA=rows_SA, axis=axis),
  )


def _positions(bin_MA, n_bins, bound):
  """A place bin * bound + (rank of the token in its bin), -1 beyond the bound."""
  hits_MN = (bin_MA[..., None] == jnp.arange(n_bins)).any(1)
  rank_MN = jnp.cumsum(hits_MN, axis=0, dtype=jnp.int32)
  safe_MA = jnp.minimum(bin_MA, n_bins - 1)
  rank_MA = jnp.take_along_axis(rank_MN, safe_MA, axis=1) - 1
  valid = (bin_MA < n_bins) & (rank_MA < bound)
  return jnp.where(valid, bin_MA * bound + rank_MA, -1), rank_MN[-1]


def _invert(places_MA, n):
  """The token of each place, M where there is none."""
  m, active = places_MA.shape
  tokens = jnp.broadcast_to(jnp.arange(m, dtype=jnp.int32)[:, None], (m, active))
  places = jnp.where(places_MA < 0, n, places_MA)
  return jnp.full((n,), m, jnp.int32).at[places].set(tokens, mode="drop")


def _first_occurrence(rank_MA):
  """True where a token names a rank for the first time."""
  same = rank_MA[:, :, None] == rank_MA[:, None, :]  # [M, A, A]
  active = rank_MA.shape[1]
  earlier = jnp.tril(jnp.ones((active, active), bool), -1)
  return ~(same & earlier).any(-1)


def _exchange(x_SX, axis, ranks):
  """All-to-all of equal shares: block i goes to rank i."""
  shares = x_SX.reshape(ranks, -1, *x_SX.shape[1:])
  return lax.all_to_all(shares, axis, 0, 0).reshape(x_SX.shape)
