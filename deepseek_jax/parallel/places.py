"""Redundant experts: which copy a token goes to, and how copies get their weights.

DeepSeek-V3 report, section 3.4: for inference, experts that carry much are held more
than once. `eplb.py` says which and where. Its places ("physical experts") stand for
experts in dispatch: each rank of the expert axes holds a contiguous share of them.

Left out: preferring the nearest copy; moving only what differs from the placement
before.

Shape suffixes: M tokens, A active experts, E experts, X most copies of one expert,
R places, N ranks, J places of one rank; W stands for a weight's own dimensions.
"""

import jax
import jax.numpy as jnp
from jax import lax


def choose_places(
  experts_MA: jax.Array, places_EX: jax.Array, axes: tuple[str, ...] = ()
) -> jax.Array:
  """The place that each chosen expert is asked at: int32 [M, A].

  The tokens of a rank that chose an expert take its copies in turn, so that on each
  rank their numbers differ by one at most. Ranks begin at different copies. Nothing
  is communicated.

  Args:
    experts_MA: int32, distinct within a token.
    places_EX: int32, where each expert is held; -1 behind its last copy.
    axes: mesh axes that experts are split over.
  """
  rank = lax.axis_index(axes) if axes else 0
  copies_E = (places_EX >= 0).sum(-1, dtype=jnp.int32)
  chose_ME = (experts_MA[..., None] == jnp.arange(len(places_EX))).any(1)
  before_ME = jnp.cumsum(chose_ME, axis=0, dtype=jnp.int32) - chose_ME
  turn_MA = rank + jnp.take_along_axis(before_ME, experts_MA, axis=1)
  return places_EX[experts_MA, turn_MA % copies_E[experts_MA]]


def fill_places(
  w_EW: jax.Array, expert_R: jax.Array, axes: tuple[str, ...] = ()
) -> jax.Array:
  """The weights at this rank's places, exactly as they are at its share of experts.

  One expert for each rank travels at a time: beside the result there must be room for
  2 N of them.

  Args:
    w_EW: this rank's share of one layer's experts, [E / N, ...].
    expert_R: int32, the expert that each place holds, of all ranks.
    axes: mesh axes that experts are split over.

  Returns:
    [R / N, ...].
  """
  if not axes:
    return w_EW[expert_R]
  ranks, rank, local = lax.axis_size(axes), lax.axis_index(axes), len(w_EW)

  def fill(expert_N):
    # To each rank what it wants, or, from a rank that does not have it, anything.
    offered_NW = w_EW[jnp.clip(expert_N - rank * local, 0, local - 1)]
    arrived_NW = lax.all_to_all(offered_NW, axes, 0, 0)
    return arrived_NW[expert_N[rank] // local]

  expert_NJ = expert_R.reshape(ranks, -1)
  return lax.map(fill, expert_NJ.T)
