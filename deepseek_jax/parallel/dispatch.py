"""Tokens to their experts and back (DeepSeek-V3 report, 3.2.2; DeepEP's contract).

A token travels once to each rank that holds one of its experts, however many of them
live there. On arrival it is copied into one row per expert; rows of one expert stand
together, each group padded to a multiple of rows that the grouped matrix product
wants. Gates travel along and are applied by the expert, so combine is a plain sum, and
combine and dispatch are each other's transpose.

Experts may be split over two mesh axes, nodes and the ranks of a node: a token then
crosses once to each node that holds one of its experts, to the rank in its own place
there, and goes on from it inside the node; sums come home the same way, rounded once
between. Any number of axes works so, each a route of its own, slowest network first.

    plan = make_plan(experts_MA, ...)                     # integers: who goes where
    rows_ZD, gates_Z = dispatch(x_MD, gates_MA, plan)     # differentiable
    out_MD = combine(rows_ZD, plan)

FP8 training sends codes and scales, which autodiff knows nothing of, by the four steps
that these are made of: `arrive` and `expand`, `collapse` and `go_home`.

Static shapes need bounds: `capacity` times the balanced load, for the tokens that
arrive at one rank and for the rows of its experts. `plan.overflow` says that a bound
was exceeded and the result is wrong; the step is then not applied and is retried with
a larger bound. `capacity=inf` cannot overflow; a single rank needs no bound at all.

Shape suffixes: M tokens, D model, E experts, A active experts a token, N ranks,
C tokens that arrive (on one rank: M), Z rows, S axes of experts, X anything.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import all_to_all
from kernels_pallas.choose import target_platform


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Plan:
  """Where everything goes, and how it comes back."""

  source_Z: jax.Array  # arrived token of each row; past the end for padding
  pair_Z: jax.Array  # arrived token and choice, as one index; past the end likewise
  target_CA: jax.Array  # rows of each arrived token, -1 for none
  group_sizes_E: jax.Array  # rows of each local expert, padding included
  copies_S: jax.Array  # int32: tokens sent along each axis, to this rank included
  overflow: jax.Array  # bool: a bound was exceeded
  routes: tuple[all_to_all.Route, ...] = ()  # along each axis; none on one rank

  @property
  def traffic(self) -> list[jax.Array]:
    """Of each axis, int32 [N, N]: tokens sent from rank to rank along this rank's line
    of the mesh, bounds ignored."""
    return [route.counts_NB for route in self.routes]


def make_plan(
  experts_MA: jax.Array,
  *,
  n_experts: int,
  row_multiple: int,
  capacity: float = math.inf,
  axes: Sequence[str] = (),
) -> Plan:
  """Plans from the router's choice; exchanges counts and choices, nothing else.

  Args:
    experts_MA: int32 experts over all ranks, distinct within a token.
    n_experts: of all ranks; rank r holds the r-th contiguous share.
    row_multiple: groups of rows are padded to a multiple of it.
    capacity: bound of arriving tokens and of rows, as a multiple of the balanced load.
    axes: names of the mesh axes that experts are split over, the slowest network
      first; none for one rank.
  """
  m, active = experts_MA.shape
  ranks, local = 1, n_experts
  local_CA, routes = experts_MA, []  # experts here, negative for those elsewhere
  for axis in axes:
    n, held = lax.axis_size(axis), local_CA.shape[0]
    ranks, local = ranks * n, local // n
    bound = min(n * held, arrival_bound(m, active, ranks, capacity))
    route = all_to_all.plan_ranks(local_CA // local, bound, axis)
    route = jax.tree.map(lambda x: checkpoint_name(x, "plan"), route)
    (local_CA,) = _send([local_CA], route)
    local_CA -= lax.axis_index(axis) * local
    # The buffer's tail is unspecified, and some of a token's experts live elsewhere.
    here_CA = route.is_filled()[:, None] & (local_CA >= 0) & (local_CA < local)
    local_CA = jnp.where(here_CA, local_CA, -1)
    routes.append(route)
  local_CA = jnp.where(local_CA < 0, local, local_CA)
  rows = row_bound(m, active, ranks, local, capacity)
  plan = _arrange(local_CA, local, rows, row_multiple)
  plan.routes = tuple(routes)
  copies = [(route.address_MA >= 0).sum(dtype=jnp.int32) for route in routes]
  plan.copies_S = jnp.stack(copies) if copies else plan.copies_S
  for route in routes:
    plan.overflow |= route.overflow
  return plan


def dispatch(
  x_MD: jax.Array, gates_MA: jax.Array, plan: Plan
) -> tuple[jax.Array, jax.Array]:
  """Copies of tokens as rows grouped by expert, and their gates; zero where padded.

  Returns:
    rows_ZD, gates_Z.
  """
  for route in plan.routes:
    x_MD, gates_MA = all_to_all.dispatch((x_MD, gates_MA), route)
  if plan.routes:
    x_MD, gates_MA = (checkpoint_name(part, "dispatched") for part in (x_MD, gates_MA))
  rows_ZD = _spread(x_MD, plan.source_Z, plan.target_CA)
  target_P1 = plan.target_CA.reshape(-1, 1)
  return rows_ZD, _spread(gates_MA.reshape(-1, 1), plan.pair_Z, target_P1)[:, 0]


def combine(rows_ZD: jax.Array, plan: Plan) -> jax.Array:
  """Sums each token's rows, first where its experts live, then at home: [M, D]."""
  return go_home(_gather_sum(rows_ZD, plan.source_Z, plan.target_CA), plan)


def arrive(values: Sequence[jax.Array], plan: Plan) -> list[jax.Array]:
  """Arrays [M, ...] of tokens at the ranks of their experts: [C, ...].

  Not differentiable; what stands where no token arrived is unspecified.
  """
  values = list(values)
  for route in plan.routes:
    values = _send(values, route)
  return values


def expand(x_CX: jax.Array, plan: Plan) -> jax.Array:
  """Arrived tokens as rows: [Z, X], zero where padded."""
  return _take(x_CX, plan.source_Z)


def expand_gates(gates_CA: jax.Array, plan: Plan) -> jax.Array:
  """The gate of each row: [Z]."""
  return gates_CA.reshape(-1).at[plan.pair_Z].get(mode="fill", fill_value=0)


def collapse(rows_ZX: jax.Array, plan: Plan) -> jax.Array:
  """The sum of each arrived token's rows: [C, X]."""
  return _gather_sum(rows_ZX, plan.source_Z, plan.target_CA)


def collapse_gates(gates_Z: jax.Array, plan: Plan) -> jax.Array:
  """Of each arrived token, what its rows say of its choices: [C, A]."""
  # Negative rows would count from the end; the row past the end is a zero.
  target_CA = jnp.where(plan.target_CA < 0, gates_Z.shape[0], plan.target_CA)
  return gates_Z.at[target_CA].get(mode="fill", fill_value=0)


def go_home[T](values_C: T, plan: Plan) -> T:
  """The sums over ranks of what became of each token there: arrays [M, ...]."""
  for route in reversed(plan.routes):
    values_C = all_to_all.combine(values_C, route)
  return values_C


def arrival_bound(m: int, active: int, ranks: int, capacity: float) -> int:
  """Tokens that may arrive at a rank: capacity x what uniform routing would send."""
  expected = ranks * m * (1 - (1 - 1 / ranks) ** active)
  worst = ranks * m
  return worst if math.isinf(capacity) else min(worst, math.ceil(capacity * expected))


def row_bound(m: int, active: int, ranks: int, local: int, capacity: float) -> int:
  """Rows of one rank, without the padding of groups."""
  worst = ranks * m * min(active, local)
  if ranks == 1 or math.isinf(capacity):
    return worst
  return min(worst, math.ceil(capacity * m * active))


def _send(values: Sequence[jax.Array], route: all_to_all.Route) -> list[jax.Array]:
  received = route.counts_L.sum()
  return all_to_all.send_rows(
    values,
    route.address_MA,
    values[0].shape[0],
    received,
    rows=route.rows,
    axis=route.axis,
  )


@jax.custom_vjp
def _spread(x_CD: jax.Array, source_Z: jax.Array, target_CA: jax.Array) -> jax.Array:
  """rows[z] = x[source[z]], 0 where source is C or more.

  `target_CA` says the same from the token's side: the rows that it is copied to,
  negative for none. With both, neither direction needs a scatter.
  """
  del target_CA
  return _take(x_CD, source_Z)


def _take(x_CX: jax.Array, source_Z: jax.Array) -> jax.Array:
  """x[source[z]], 0 where source is C or more.

  A GPU copies words of 32 bits, four at a time; of narrower types, for which XLA would
  move as many bytes less with each instruction, a word is several values.
  """
  dtype, width = x_CX.dtype, x_CX.shape[-1]
  values = 4 // dtype.itemsize
  if values < 2 or width % values or target_platform() != "gpu":
    return x_CX.at[source_Z].get(mode="fill", fill_value=0)
  words_CX = lax.bitcast_convert_type(
    x_CX.reshape(-1, width // values, values), jnp.int32
  )
  words_ZX = words_CX.at[source_Z].get(mode="fill", fill_value=0)
  return lax.bitcast_convert_type(words_ZX, dtype).reshape(-1, width)


@jax.custom_vjp
def _gather_sum(rows_ZD: jax.Array, source_Z: jax.Array, target_CA: jax.Array):
  """The transpose of `_spread`: out[c] = sum of rows[target[c]], in FP32 inside."""
  del source_Z
  target_CA = jnp.where(target_CA < 0, rows_ZD.shape[0], target_CA)
  wide = jnp.promote_types(rows_ZD.dtype, jnp.float32)
  out = jnp.zeros((target_CA.shape[0], rows_ZD.shape[1]), wide)
  for a in range(target_CA.shape[1]):
    out += rows_ZD.at[target_CA[:, a]].get(mode="fill", fill_value=0).astype(wide)
  return out.astype(rows_ZD.dtype)


def _spread_fwd(x, source, target):
  return _spread(x, source, target), (source, target)


def _spread_bwd(places, g):
  return _gather_sum(g, *places), *map(_float0, places)


def _gather_sum_fwd(rows, source, target):
  return _gather_sum(rows, source, target), (source, target)


def _gather_sum_bwd(places, g):
  return _spread(g, *places), *map(_float0, places)


_spread.defvjp(_spread_fwd, _spread_bwd)
_gather_sum.defvjp(_gather_sum_fwd, _gather_sum_bwd)


def _float0(x: jax.Array) -> np.ndarray:
  return np.zeros(x.shape, jax.dtypes.float0)


def _arrange(experts_CA, n_experts, rows, multiple) -> Plan:
  """One row per (token, expert) pair, grouped by expert; expert n_experts is none."""
  rows = -(-(rows + n_experts * (multiple - 1)) // multiple) * multiple
  hits_CE = (experts_CA[..., None] == jnp.arange(n_experts)).any(1)
  rank_CE = jnp.cumsum(hits_CE, axis=0, dtype=jnp.int32)
  sizes_E = -(-rank_CE[-1] // multiple) * multiple
  starts_E = jnp.cumsum(sizes_E, dtype=jnp.int32) - sizes_E
  place_CE = starts_E + rank_CE - 1
  safe_CA = jnp.minimum(experts_CA, n_experts - 1)
  target_CA = jnp.take_along_axis(place_CE, safe_CA, axis=1)
  fits_CA = (experts_CA < n_experts) & (target_CA < rows)
  target_CA = checkpoint_name(jnp.where(fits_CA, target_CA, -1), "plan")
  # After an overflow the sizes must still fit the buffer: the result is discarded.
  fitting_E = jnp.clip(rows - starts_E, 0, sizes_E)
  return Plan(
    source_Z=checkpoint_name(_invert(target_CA, rows), "plan"),
    pair_Z=checkpoint_name(_invert(target_CA.reshape(-1, 1), rows), "plan"),
    target_CA=target_CA,
    group_sizes_E=checkpoint_name(fitting_E, "plan"),
    copies_S=jnp.zeros((0,), jnp.int32),
    overflow=sizes_E.sum() > rows,
  )


def _invert(places_CA, n):
  """The token of each place, C where there is none."""
  c, active = places_CA.shape
  tokens = jnp.broadcast_to(jnp.arange(c, dtype=jnp.int32)[:, None], (c, active))
  places = jnp.where(places_CA < 0, n, places_CA)
  return jnp.full((n,), c, jnp.int32).at[places].set(tokens, mode="drop")
