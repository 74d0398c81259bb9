"""The routed experts of an MoE layer in steps between transfers, for `moe_overlap`.

The same calls as in `model/experts.py`, cut where rows travel: pack, (dispatch),
forward, (combine), pack the gradient, (dispatch), backward, (combine).

Shape suffixes: M tokens, D model, F hidden, E experts, A active experts a token,
C tokens that arrive, Z rows; d is D / 128.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from deepseek_jax.parallel import dispatch as d
from deepseek_jax.precision import feed_forward as ff
from deepseek_jax.precision.tiles import Recipe
from kernels_pallas import all_to_all as a2a


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
  """One micro-batch on one rank, and how it travels.

  The way of `beside`: arrays travel each by itself, sent by `num_sms` multiprocessors.
  """

  x_MD: jax.Array
  gates_MA: jax.Array
  dy_MD: jax.Array
  plan: d.Plan

  def dispatch(self, values):
    return d.arrive(values, self.plan)

  def combine(self, values):
    """Without its sum: each copy of a token comes home."""
    return a2a.bring_home(values, self.route)

  def dispatch_each(self, values, num_sms):
    send = functools.partial(_send, num_sms)
    return [(send, (value, self.route)) for value in values]

  def combine_each(self, values, num_sms):
    send = functools.partial(_bring_home, num_sms)
    return [(send, (value, self.route)) for value in values]

  def sums(self, home):
    return a2a.sum_copies(home, self.route)

  @property
  def route(self):
    return self.plan.routes[0]


def _send(num_sms, operands):
  value, route = operands
  received, count = route.counts_L.sum(), len(route.address_MA)
  options = {"rows": route.rows, "axis": route.axis, "num_sms": num_sms}
  return a2a.send_rows([value], route.address_MA, count, received, **options)[0]


def _bring_home(num_sms, operands):
  value, route = operands
  return a2a.bring_home([value], route, num_sms=num_sms)[0]


@dataclasses.dataclass(frozen=True)
class Bf16:
  """What a rank does between transfers, in BF16: weights [E, D, 2F] and [E, F, D]."""

  num_sms: int | None = None

  def pack(self, x_MD, gates_MA):
    return [x_MD, gates_MA]

  def forward(self, weights, plan, arrived):
    """The sum of each arrived token's rows, and what the backward pass needs."""
    here = dataclasses.replace(plan, routes=())

    def experts(x_CD, gates_CA, weights):
      rows_ZD, gates_Z = d.dispatch(x_CD, gates_CA, here)
      y_ZD = ff.expert_feed_forward(
        rows_ZD, gates_Z, here.group_sizes_E, *weights, num_sms=self.num_sms
      )
      return d.combine(y_ZD, here)

    return jax.vjp(experts, *arrived, weights)

  def pack_gradient(self, dy_MD):
    return [dy_MD]

  def backward(self, weights, plan, kept, arrived):
    """The gradients of what arrived, and of the weights."""
    del weights, plan
    dx_CD, d_gates_CA, d_weights = kept(*arrived)
    return [dx_CD, d_gates_CA], d_weights


@dataclasses.dataclass(frozen=True)
class Fp8:
  """The same in FP8, as `model/experts.py` does it: weights are codes and scales."""

  num_sms: int | None = None

  @property
  def recipe(self):
    return Recipe(num_sms=self.num_sms)

  def pack(self, x_MD, gates_MA):
    codes_MD, scales_dM = self.recipe.rows(x_MD, power_of_two=True)
    return [codes_MD, scales_dM.T, gates_MA]

  def forward(self, weights, plan, arrived):
    *tokens, gates_CA = arrived
    gates_Z = d.expand_gates(gates_CA, plan)
    y_ZD, kept = ff.fp8_forward(
      _expand(tokens, plan),
      gates_Z,
      plan.group_sizes_E,
      weights,
      self.recipe,
      jnp.bfloat16,
    )
    return d.collapse(y_ZD, plan), (tokens, gates_Z, kept)

  def pack_gradient(self, dy_MD):
    codes_MD, scales_dM = self.recipe.gradient_rows(dy_MD)
    return [codes_MD, scales_dM.T]

  def backward(self, weights, plan, kept, arrived):
    (tokens, gates_Z, hidden), recipe = kept, self.recipe
    dy_rows = _expand(arrived, plan)
    dx_ZD, d_gates_Z, *d_weights = ff.fp8_backward(
      recipe.tile_again(_expand(tokens, plan)),
      hidden,
      gates_Z,
      plan.group_sizes_E,
      weights,
      (dy_rows, recipe.tile_again(dy_rows)),
      recipe,
      jnp.bfloat16,
    )
    assert d_gates_Z is not None
    back = [d.collapse(dx_ZD, plan), d.collapse_gates(d_gates_Z, plan)]
    return back, tuple(d_weights)


def _expand(tokens, plan):
  codes_CD, scales_Cd = tokens
  return d.expand(codes_CD, plan), d.expand(scales_Cd, plan).T
