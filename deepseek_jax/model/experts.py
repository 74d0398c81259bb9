"""The routed experts: tokens there, through the network, and back.

DeepSeekMoE (2401.06066) section 3; DeepSeek-V3 report, sections 2.1.2, 3.2.2 and 3.3.
In FP8, what travels is FP8 where rows are copied out to experts (tokens, and in the
backward pass the gradients of outputs), with scales that are powers of two because it
is tiled a second time on arrival, for the weight gradient; and BF16 where rows are
summed. What arrived is kept in FP8 for the backward pass.

Decoding dispatches in a form of its own, see parallel/decode_dispatch.py.

Shape suffixes: M tokens, D model, F hidden, E experts, A active experts a token,
C tokens that arrive, Z rows; d is D / 128. Decoding: L experts of C slots.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import ModelConfig
from deepseek_jax.mesh import EXPERT_AXES
from deepseek_jax.model.layers import weight
from deepseek_jax.parallel import decode_dispatch
from deepseek_jax.parallel import dispatch as d
from deepseek_jax.parallel.decode_dispatch import Slots
from deepseek_jax.precision import feed_forward as ff
from deepseek_jax.precision.tiles import Fp8Weight, Recipe, Tiled, keep


class Experts(nnx.Module):
  """The routed experts' weights, split over the axes of experts."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    k13, k2 = jax.random.split(key)
    e, dim, f = config.n_routed_experts, config.dim, config.moe_inter_dim
    spec, std, one = P(EXPERT_AXES), config.init_std, {"inputs": 1, "outputs": 1}
    self.w13 = weight(k13, (e, dim, 2 * f), std, spec, **one)
    self.w2 = weight(k2, (e, f, dim), std, spec, **one)

  def plan(
    self,
    experts_MA: jax.Array,
    *,
    n_experts: int,
    capacity: float = math.inf,
    axes: Sequence[str] = (),
    decoding: bool = False,
  ) -> d.Plan | Slots:
    """Where tokens go: to slots when decoding, else as rows in groups.

    One rank sends nothing and takes what has fewer rows, as all of them are read and
    written between the products: groups are padded each, slots are one a token.
    """
    m, active = experts_MA.shape
    groups = m * active + n_experts * (self.row_multiple - 1)
    slots = n_experts * decode_dispatch.slots_of_expert(m)
    if decoding and (axes or slots <= groups):
      return decode_dispatch.make_slots(experts_MA, n_experts=n_experts, axes=axes)
    return d.make_plan(
      experts_MA,
      n_experts=n_experts,
      row_multiple=self.row_multiple,
      capacity=capacity,
      axes=axes,
    )

  def __call__(
    self, x_MD: jax.Array, gates_MA: jax.Array, plan: d.Plan | Slots
  ) -> jax.Array:
    """The sum over each token's experts of gate times output, [M, D]."""
    w13, w2 = self.w13[...], self.w2[...]
    if isinstance(plan, Slots):
      y_LCD = _in_slots(x_MD, w13, w2, plan)
      return decode_dispatch.combine(y_LCD, gates_MA, plan)
    if isinstance(w13, Fp8Weight):
      codes = w13.codes, w2.codes
      return _fp8_experts(
        x_MD, gates_MA, w13.gradient, w2.gradient, codes, plan, w13.recipe
      )
    rows_ZD, gates_Z = d.dispatch(x_MD, gates_MA, plan)
    out_ZD = ff.expert_feed_forward(rows_ZD, gates_Z, plan.group_sizes_E, w13, w2)
    return d.combine(out_ZD, plan)

  @property
  def row_multiple(self) -> int:
    """What the rows of each expert must be padded to."""
    return ff.row_multiple(self.w13[...])


def _in_slots(x_MD, w13, w2, slots: Slots) -> jax.Array:
  """Tokens in their slots through the experts there: [L, C, D]."""
  if not isinstance(w13, Fp8Weight):
    (x_LCD,) = decode_dispatch.dispatch([x_MD], slots)
    return ff.masked_feed_forward(x_LCD, slots.counts_L, w13, w2)
  codes_MD, scales_dM = w13.recipe.rows(x_MD, power_of_two=True)  # as in training
  codes_LCD, scales_LCd = decode_dispatch.dispatch([codes_MD, scales_dM.T], slots)
  rows = codes_LCD, jnp.moveaxis(scales_LCd, -1, 0)
  codes = w13.codes, w2.codes
  return ff.fp8_masked_forward(rows, slots.counts_L, codes, w13.recipe, x_MD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _fp8_experts(x_MD, gates_MA, d13, d2, codes, plan, recipe: Recipe):
  out_MD, _ = _fp8_forward(x_MD, gates_MA, d13, d2, codes, plan, recipe, keeping=False)
  return out_MD


def _fp8_forward(x_MD, gates_MA, d13, d2, codes, plan, recipe, keeping=True):
  del d13, d2
  arrived = _arrive(recipe.rows(x_MD, power_of_two=True), [gates_MA], plan)
  if plan.routes:
    arrived = keep(arrived, "dispatched")
  *tokens, gates_CA = arrived
  gates_Z = d.expand_gates(gates_CA, plan)
  y_ZD, kept = ff.fp8_forward(
    _expand(tokens, plan),
    gates_Z,
    plan.group_sizes_E,
    codes,
    recipe,
    x_MD.dtype,
    keeping,
  )
  out_MD = d.go_home(d.collapse(y_ZD, plan), plan)
  return out_MD, (tokens, gates_Z, kept, codes, plan)


def _fp8_backward(recipe, residuals, dy_MD):
  tokens, gates_Z, kept, codes, plan = residuals
  dy_rows = _expand(_arrive(recipe.gradient_rows(dy_MD), [], plan), plan)
  dx_ZD, d_gates_Z, d13, d2 = ff.fp8_backward(
    recipe.tile_again(_expand(tokens, plan)),
    kept,
    gates_Z,
    plan.group_sizes_E,
    codes,
    (dy_rows, recipe.tile_again(dy_rows, gradient=True)),
    recipe,
    dy_MD.dtype,
  )
  assert d_gates_Z is not None
  dx_CD, d_gates_CA = d.collapse(dx_ZD, plan), d.collapse_gates(d_gates_Z, plan)
  dx_MD, d_gates_MA = d.go_home((dx_CD, d_gates_CA), plan)
  return dx_MD, d_gates_MA, d13, d2, None, None


_fp8_experts.defvjp(_fp8_forward, _fp8_backward)


def _arrive(rows: Tiled, more: list[jax.Array], plan: d.Plan) -> list[jax.Array]:
  """Codes [C, D], scales [C, d] and what else travels with the tokens."""
  codes_MD, scales_dM = rows
  return d.arrive([codes_MD, scales_dM.T, *more], plan)


def _expand(tokens: list[jax.Array], plan: d.Plan) -> Tiled:
  codes_CD, scales_Cd = tokens
  return d.expand(codes_CD, plan), d.expand(scales_Cd, plan).T
