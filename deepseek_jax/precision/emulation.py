"""Products of FP8 operands in plain JAX: what kernels compute, and what none does.

Operands are dequantised and multiplied in FP32, any FP8 format and any tiling; without
promotion, sums keep the 14 bits or so of Hopper's FP8 tensor cores (DeepSeek-V3 report,
section 3.3.2, figure 7b). Left out: rounding inside the tensor core's 128 promoted
products, and without promotion that of single products when an instruction aligns
them, so that what is lost here is a little less than on the hardware.

On a Hopper GPU the products are those of its kernels, see hopper.py; the rest of the
emulated recipe stays plain JAX.

Shape suffixes: M rows, K contraction, N output, I and J outputs of a weight gradient,
E experts, G groups of capacity C, R rows of one tile; a lower-case letter is that
dimension divided by 128.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.precision import hopper
from kernels_pallas.fp8_matmul.reference import (
  dequantize_blocks,
  dequantize_tiles,
  multiply_14_bit,
)
from kernels_pallas.quantize import TILE

Tiled = tuple[jax.Array, jax.Array]


def multiply(
  a: Tiled,
  b: Tiled,
  group_sizes_E: jax.Array | None,
  promotion: bool,
) -> jax.Array:
  """a b^T in FP32: rows [M, K] times a weight [N, K], or by groups [E, N, K]."""
  if hopper.can_multiply(*b[0].shape[-2:]):
    return hopper.multiply(a, b, group_sizes_E, promotion)
  product = _dot if promotion else _dot_14_bit
  a_MK = dequantize_tiles(*a)
  if group_sizes_E is None:
    return product(a_MK, dequantize_blocks(*b))
  b_ENK = jax.vmap(dequantize_blocks)(*b)
  ends_E = jnp.cumsum(group_sizes_E)

  def tile(start_and_rows):
    start, a_RK = start_and_rows
    expert = jnp.searchsorted(ends_E, start, side="right", method="compare_all")
    y_RN = product(a_RK, b_ENK.at[expert].get(mode="clip"))
    return jnp.where(expert < len(ends_E), y_RN, 0)

  starts = jnp.arange(0, len(a_MK), TILE)
  y_mRN = lax.map(tile, (starts, a_MK.reshape(len(starts), TILE, -1)))
  return y_mRN.reshape(len(a_MK), -1)


def multiply_masked(
  a: Tiled, b: Tiled, counts_G: jax.Array, promotion: bool
) -> jax.Array:
  """Groups of one capacity in FP32, [G, C, K] times [G, N, K]: see tiles.py."""
  codes_GCK, scales_kGC = a

  def group(parts):
    codes_CK, scales_kC, weight, count = parts
    y_CN = multiply((codes_CK, scales_kC), weight, None, promotion)
    return jnp.where(jnp.arange(len(y_CN))[:, None] < count, y_CN, 0)

  return lax.map(group, (codes_GCK, scales_kGC.swapaxes(0, 1), b, counts_G))


def weight_gradient(
  a: Tiled,
  b: Tiled,
  group_sizes_E: jax.Array | None,
  promotion: bool,
) -> jax.Array:
  """a b^T over tokens in FP32: [I, M], [J, M] to [I, J], or by groups [E, I, J]."""
  if hopper.can_multiply(len(a[0]), len(b[0])):
    return hopper.weight_gradient(a, b, group_sizes_E, promotion)
  a_IM, b_JM = dequantize_tiles(*a), dequantize_tiles(*b)
  if group_sizes_E is None:
    return (_dot if promotion else _dot_14_bit)(a_IM, b_JM)

  def expert(start_and_end):
    def tile(t, acc_IJ):
      cut = functools.partial(
        lax.dynamic_slice_in_dim, start_index=t * TILE, slice_size=TILE, axis=1
      )
      if promotion:
        return acc_IJ + _dot(cut(a_IM), cut(b_JM))
      return _dot_14_bit(cut(a_IM), cut(b_JM), acc_MN=acc_IJ)

    zero_IJ = jnp.zeros((len(a_IM), len(b_JM)), jnp.float32)
    start, end = start_and_end
    return lax.fori_loop(start // TILE, end // TILE, tile, zero_IJ)

  ends_E = jnp.cumsum(group_sizes_E)
  return lax.map(expert, (ends_E - group_sizes_E, ends_E))


def _dot(a_MK: jax.Array, b_NK: jax.Array) -> jax.Array:
  return jnp.dot(a_MK, b_NK.T, precision=lax.Precision.HIGHEST)


_dot_14_bit = functools.partial(multiply_14_bit, align_products=False)
