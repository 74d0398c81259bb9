"""Matrix products of the projections, in BF16/FP32 or in FP8.

All weights of the network except embedding, head, router and MTP's joining projection
meet activations here or in `feed_forward.py`, so a change of arithmetic is a change of
these files. In FP8 (DeepSeek-V3 report, section 3.3) the product and both its
gradients are FP8 products; which of the two it is, the type of the weight says.
"""

import functools
import math

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.precision.tiles import Fp8Weight, Recipe, keep
from kernels_pallas import quantize


def linear(
  x: jax.Array,
  w: jax.Array | Fp8Weight,
  contract: int = 1,
  saved: str | None = None,
) -> jax.Array:
  """x @ w over the last `contract` dimensions of x and the first of w.

  Args:
    x: activations [..., i1, ..., ic].
    w: weights [i1, ..., ic, o1, ...], of x's dtype or in FP8.
    contract: c, the number of contracted dimensions.
    saved: the name under which x is kept for the backward pass where activations are
      recomputed. In FP8 it is kept in E5M6 (12 bits), as V3 keeps the attention output.

  Returns:
    [..., o1, ...] in x's dtype; products accumulate in FP32 at least.
  """
  inner = math.prod(w.shape[:contract])
  batch, out = x.shape[: x.ndim - contract], w.shape[contract:]
  if isinstance(w, Fp8Weight):
    gradient_KN = None if w.gradient is None else w.gradient.reshape(inner, -1)
    y = _fp8_linear(
      x.reshape(-1, inner), gradient_KN, w.by_output, w.by_input, w.recipe, saved
    )
    return y.reshape(*batch, *out)
  if saved:
    x = checkpoint_name(x, saved)
  y = lax.dot_general(
    x.reshape(-1, inner), w.reshape(inner, -1), (((1,), (0,)), ((), ()))
  )
  return y.reshape(*batch, *out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _fp8_linear(x_MK, gradient_KN, by_output, by_input, recipe: Recipe, saved):
  del gradient_KN, by_input, saved
  return recipe.multiply(recipe.rows(x_MK), by_output, x_MK.dtype)


def _fp8_linear_fwd(x_MK, gradient_KN, by_output, by_input, recipe, saved):
  y_MN = _fp8_linear(x_MK, gradient_KN, by_output, by_input, recipe, saved)
  kept = x_MK
  if saved and recipe.config.attention_output == "e5m6":
    kept = quantize.pack_e5m6(x_MK, impl=recipe.quantizer)
  if saved:
    kept = keep(kept, saved)
  return y_MN, (kept, by_input)


def _fp8_linear_bwd(recipe, saved, residuals, dy_MN):
  del saved
  kept, by_input = residuals
  packed = isinstance(kept, tuple)
  x_MK = quantize.unpack_e5m6(*kept, dtype=dy_MN.dtype) if packed else kept
  rows, columns = recipe.gradient(dy_MN)
  dx_MK = recipe.multiply(rows, by_input, dy_MN.dtype)
  x_columns = recipe.columns(x_MK, power_of_two=packed)  # tiled a second time
  return dx_MK, recipe.weight_gradient(x_columns, columns), None, None


_fp8_linear.defvjp(_fp8_linear_fwd, _fp8_linear_bwd)
