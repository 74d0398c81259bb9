"""SwiGLU feed-forward, of one network or of many experts, in BF16/FP32 or in FP8.

    y = w2(silu(w1 x) * (w3 x) * gate)          w1 and w3 side by side in `w13`

DeepSeekMoE: gates are applied before the down-projection, so that summing experts is a
plain sum. FP8 (DeepSeek-V3 report, 3.3 and 3.2.3): six FP8 products, SwiGLU's input
kept in FP8 and its output computed again; quantising is fused with SwiGLU both ways.

Shape suffixes: Z rows, D model, F hidden, E experts; G groups of capacity C; d is
D / 128, f F / 128.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.precision.linear import linear
from deepseek_jax.precision.tiles import (
  TILE,
  Fp8Weight,
  Recipe,
  Tiled,
  WeightCodes,
  keep,
)
from kernels_pallas import grouped_matmul as grouped


def swiglu(x_F2: jax.Array) -> jax.Array:
  """silu(gate) * up for the two halves of the last dimension, in FP32 inside."""
  gate, up = jnp.split(x_F2, 2, axis=-1)
  return (jax.nn.silu(_widen(gate)) * _widen(up)).astype(x_F2.dtype)


def _widen(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def feed_forward(
  x: jax.Array, w13_D2F: jax.Array | Fp8Weight, w2_FD: jax.Array | Fp8Weight
) -> jax.Array:
  """The network for x [..., D]; in x's dtype."""
  if isinstance(w13_D2F, Fp8Weight):
    assert isinstance(w2_FD, Fp8Weight)
    y_ZD = _fp8(x.reshape(-1, x.shape[-1]), None, None, w13_D2F, w2_FD)
    return y_ZD.reshape(x.shape)
  hidden = checkpoint_name(linear(x, w13_D2F), "swiglu_input")
  return linear(swiglu(hidden), w2_FD)


def row_multiple(w13_ED2F: jax.Array | Fp8Weight) -> int:
  """What the rows of each expert must be padded to for `expert_feed_forward`."""
  return TILE if isinstance(w13_ED2F, Fp8Weight) else grouped.row_multiple()


def expert_feed_forward(
  rows_ZD: jax.Array,
  gates_Z: jax.Array,
  group_sizes_E: jax.Array,
  w13_ED2F: jax.Array | Fp8Weight,
  w2_EFD: jax.Array | Fp8Weight,
  num_sms: int | None = None,
) -> jax.Array:
  """Each group of rows through its own expert, times its gate.

  Args:
    rows_ZD: rows grouped by expert, groups padded to `row_multiple` with zeros.
    gates_Z: FP32 weights.
    group_sizes_E: int32 rows of each group, padding included.
    w13_ED2F, w2_EFD: the experts' weights.
    num_sms: as `grouped_matmul`'s; for FP8 the recipe says it.
  """
  if isinstance(w13_ED2F, Fp8Weight):
    assert isinstance(w2_EFD, Fp8Weight)
    return _fp8(rows_ZD, gates_Z, group_sizes_E, w13_ED2F, w2_EFD)
  assert not isinstance(w2_EFD, Fp8Weight)
  multiply = functools.partial(grouped.grouped_matmul, num_sms=num_sms)
  hidden = multiply(rows_ZD, w13_ED2F, group_sizes_E)
  hidden = checkpoint_name(hidden, "swiglu_input")
  gated = _widen(swiglu(hidden)) * gates_Z[:, None]
  return multiply(gated.astype(rows_ZD.dtype), w2_EFD, group_sizes_E)


def masked_feed_forward(
  x_GCD: jax.Array, counts_G: jax.Array, w13_GD2F: jax.Array, w2_GFD: jax.Array
) -> jax.Array:
  """The first counts_G rows of each group through its own expert, without gates.

  Returns:
    [G, C, D], 0 in rows from a group's count on, whatever stands there in x.
  """
  hidden_GC2F = grouped.masked_matmul(x_GCD, w13_GD2F, counts_G)
  return grouped.masked_matmul(swiglu(hidden_GC2F), w2_GFD, counts_G)


def fp8_masked_forward(
  x: Tiled,
  counts_G: jax.Array,
  codes: tuple[WeightCodes, WeightCodes],
  recipe: Recipe,
  dtype,
) -> jax.Array:
  """As `masked_feed_forward`, of rows [G, C, D] with scales [d, G, C]; in `dtype`."""
  (by_output13, _), (by_output2, _) = codes
  hidden_GC2F = recipe.multiply_masked(x, by_output13, counts_G, dtype)
  groups, capacity, width = hidden_GC2F.shape
  codes_ZF, scales_fZ = recipe.activate(hidden_GC2F.reshape(-1, width), None)
  activated = (
    codes_ZF.reshape(groups, capacity, -1),
    scales_fZ.reshape(-1, groups, capacity),
  )
  return recipe.multiply_masked(activated, by_output2, counts_G, dtype)


def _fp8(x_ZD, gates_Z, sizes_E, w13: Fp8Weight, w2: Fp8Weight):
  codes = w13.codes, w2.codes
  return _fp8_feed_forward(
    x_ZD, gates_Z, w13.gradient, w2.gradient, codes, sizes_E, w13.recipe
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _fp8_feed_forward(x_ZD, gates_Z, d13, d2, codes, sizes_E, recipe: Recipe):
  y_ZD, _ = _fp8_fwd(x_ZD, gates_Z, d13, d2, codes, sizes_E, recipe, keeping=False)
  return y_ZD


def _fp8_fwd(x_ZD, gates_Z, d13, d2, codes, sizes_E, recipe, keeping=True):
  del d13, d2
  x, dtype = recipe.rows(x_ZD), x_ZD.dtype
  y_ZD, kept = fp8_forward(x, gates_Z, sizes_E, codes, recipe, dtype, keeping)
  return y_ZD, (x_ZD, kept, gates_Z, sizes_E, codes)


def _fp8_bwd(recipe, residuals, dy_ZD):
  x_ZD, kept, gates_Z, sizes_E, codes = residuals
  x_columns, dy = recipe.columns(x_ZD), recipe.gradient(dy_ZD)
  gradients = fp8_backward(
    x_columns, kept, gates_Z, sizes_E, codes, dy, recipe, x_ZD.dtype
  )
  return *gradients, None, None


_fp8_feed_forward.defvjp(_fp8_fwd, _fp8_bwd)


def fp8_forward(
  x: Tiled,
  gates_Z: jax.Array | None,
  group_sizes_E: jax.Array | None,
  codes: tuple[WeightCodes, WeightCodes],
  recipe: Recipe,
  dtype,
  keeping: bool = True,
) -> tuple[jax.Array, Tiled | None]:
  """The network on rows, by groups if there are any.

  Returns:
    y_ZD in `dtype`, and, unless there will be no backward pass (`keeping`), SwiGLU's
    input in FP8 for `fp8_backward`.
  """
  (by_output13, _), (by_output2, _) = codes
  hidden_Z2F = recipe.multiply(x, by_output13, dtype, group_sizes_E)
  if keeping:
    activated, kept = recipe.activate_and_keep(hidden_Z2F, gates_Z)
    kept = keep(kept, "swiglu_input")
  else:
    activated, kept = recipe.activate(hidden_Z2F, gates_Z), None
  return recipe.multiply(activated, by_output2, dtype, group_sizes_E), kept


def fp8_backward(
  x_columns: Tiled,
  kept: Tiled,
  gates_Z: jax.Array | None,
  group_sizes_E: jax.Array | None,
  codes: tuple[WeightCodes, WeightCodes],
  dy: tuple[Tiled, Tiled],
  recipe: Recipe,
  dtype,
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
  """From dy as rows and as columns: dx_ZD in `dtype`, d_gates_Z, d13 and d2 in FP32."""
  (_, by_input13), (_, by_input2) = codes
  assert by_input13 is not None
  assert by_input2 is not None
  d_activated_ZF = recipe.multiply(dy[0], by_input2, dtype, group_sizes_E)
  (d_rows, d_columns), activated, d_gates_Z = recipe.activate_backward(
    kept, gates_Z, d_activated_ZF
  )
  dx_ZD = recipe.multiply(d_rows, by_input13, dtype, group_sizes_E)
  d13 = recipe.weight_gradient(x_columns, d_columns, group_sizes_E)
  d2 = recipe.weight_gradient(activated, dy[1], group_sizes_E)
  return dx_ZD, d_gates_Z, d13, d2
