"""Tokens to fixed slots of their experts and back: the dispatch of decoding.

DeepSeek-V3 report, section 3.4.2; the low-latency kernels of DeepEP. Every expert has
as many slots as there are tokens on all ranks together. A token goes straight to one
slot of each of its experts, whatever network lies between, and each output comes
straight home, where it is weighted by its gate and summed in FP32. So gates stay at
home, nothing is regrouped on arrival, and only counts are exchanged beforehand: two
exchanges of rows where training has three. The price is a row for each expert, not for
each rank of experts, and buffers that are mostly empty; products skip what is empty.

    slots = make_slots(experts_MA, n_experts=..., axes=...)
    (x_LCD,) = dispatch([x_MD], slots)
    y_LCD = ...                    # the first slots.counts_L rows of each expert matter
    out_MD = combine(y_LCD, gates_MA, slots)

A smaller capacity could overflow, and a decoding step has no second try: the cache is
written. With all tokens' worth of slots nothing is dropped and nothing has to be
checked. At 128 tokens a rank, 32 ranks and 8 experts on each, the slots of one layer
are 448 MiB in BF16 at V3's width.

Left out: gradients, nobody decodes with them; two micro-batches that hide each other's
exchanges.

Shape suffixes: M tokens, A active experts a token, E experts, L experts of this rank,
C slots of an expert, D model, X anything.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import all_to_all

_CAPACITY_MULTIPLE = 8  # the GPU's masked products want it


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Slots:
  """Which slots tokens take, and where their outputs stand once they are home."""

  counts_L: jax.Array  # int32: slots taken, the first ones of each expert
  home_MA: jax.Array  # int32: row of each output among those that came home
  token_S: jax.Array | None  # on one rank, the token of each slot; M for none
  route: all_to_all.Route | None  # on several
  copies_S: jax.Array  # int32: rows sent along each axis, to this rank included
  capacity: int = dataclasses.field(metadata={"static": True})

  @property
  def overflow(self) -> jax.Array:
    """False: there is a slot for every token."""
    return jnp.zeros((), bool)


def make_slots(
  experts_MA: jax.Array, *, n_experts: int, axes: Sequence[str] = ()
) -> Slots:
  """Gives slots by expert, then source rank, then token; exchanges counts, no more.

  Args:
    experts_MA: int32 experts over all ranks, distinct within a token.
    n_experts: of all ranks; rank r holds the r-th contiguous share.
    axes: names of the mesh axes that experts are split over, taken as one.
  """
  m = experts_MA.shape[0]
  if not axes:
    return _slots_here(experts_MA, n_experts, slots_of_expert(m))
  axis = axes[0] if len(axes) == 1 else tuple(axes)
  ranks = lax.axis_size(axis)
  capacity = slots_of_expert(ranks * m)
  route = all_to_all.plan_experts(experts_MA, n_experts // ranks, capacity, axis)
  copies = (route.address_MA >= 0).sum(dtype=jnp.int32)
  return Slots(
    counts_L=route.counts_L,
    home_MA=route.home_MA,
    token_S=None,
    route=route,
    copies_S=jnp.full((len(axes),), copies),
    capacity=capacity,
  )


def slots_of_expert(tokens: int) -> int:
  """Slots that never run out for so many tokens on all ranks."""
  return -(-tokens // _CAPACITY_MULTIPLE) * _CAPACITY_MULTIPLE


def dispatch(values: Sequence[jax.Array], slots: Slots) -> list[jax.Array]:
  """Arrays [M, X] of tokens in the slots of this rank's experts: [L, C, X].

  What stands in slots that nobody took is unspecified, NaN included.
  """
  if slots.route is None:
    taken = [x.at[slots.token_S].get(mode="fill", fill_value=0) for x in values]
  else:
    taken = all_to_all.dispatch(list(values), slots.route)
  experts = len(slots.counts_L)
  return [x.reshape(experts, slots.capacity, *x.shape[1:]) for x in taken]


def combine(y_LCD: jax.Array, gates_MA: jax.Array, slots: Slots) -> jax.Array:
  """The sum of each token's outputs times their gates, in FP32: [M, D] in y's dtype."""
  home_RD = y_LCD.reshape(-1, y_LCD.shape[-1])
  if slots.route is not None:
    home_RD = all_to_all.bring_home(home_RD, slots.route)
  wide = jnp.promote_types(y_LCD.dtype, jnp.float32)
  out_MD = jnp.zeros((gates_MA.shape[0], y_LCD.shape[-1]), wide)
  for a in range(gates_MA.shape[1]):
    out_MD += gates_MA[:, a, None] * home_RD[slots.home_MA[:, a]].astype(wide)
  return out_MD.astype(y_LCD.dtype)


def _slots_here(experts_MA: jax.Array, n_experts: int, capacity: int) -> Slots:
  """One rank: its experts are all, and what comes home stands where it is."""
  m = experts_MA.shape[0]
  taken_ME = (experts_MA[:, :, None] == jnp.arange(n_experts)).any(1)
  rank_ME = jnp.cumsum(taken_ME, axis=0, dtype=jnp.int32)
  slot_MA = jnp.take_along_axis(rank_ME, experts_MA, axis=1) - 1
  slot_MA += experts_MA * capacity
  nobody = jnp.full((n_experts * capacity,), m, jnp.int32)
  return Slots(
    counts_L=rank_ME[-1],
    home_MA=slot_MA,
    token_S=nobody.at[slot_MA].set(jnp.arange(m, dtype=jnp.int32)[:, None]),
    route=None,
    copies_S=jnp.zeros((0,), jnp.int32),
    capacity=capacity,
  )
