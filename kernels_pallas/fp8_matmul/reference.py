"""Block-scaled FP8 products in plain jnp, FP32: the meaning of the operation.

Each code times its scale, in FP32, then one FP32 product. The kernels add up the same
terms in another order: 128 of them unscaled, then scaled.

`multiply_14_bit` is another operation, for the paper's ablation: what Hopper's tensor
cores do when they are left to accumulate by themselves (DeepSeek-V3 report, 3.3.2).

Shapes: M rows (tokens), K contraction, N output; I and J the two outputs of a weight
gradient; a lower-case letter is that dimension / 128, rounded up; T terms and D depth
of one tensor-core instruction.
"""

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 128
_WGMMA_DEPTH = 32  # of the contraction, of one FP8 tensor-core instruction


def unsupported(n: int, k: int) -> str | None:
  """Nothing is: any shape."""
  del n, k


def multiply(
  a_MK: jax.Array,
  sa_kM: jax.Array,
  b_NK: jax.Array,
  sb_nk: jax.Array,
  *,
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  num_sms: int | None = None,
) -> jax.Array:
  """a b^T of the dequantised operands, [M, N]."""
  del num_sms
  a_MK, b_NK = dequantize_tiles(a_MK, sa_kM), dequantize_blocks(b_NK, sb_nk)
  c_MN = jnp.dot(a_MK, b_NK.T, precision=lax.Precision.HIGHEST)
  return c_MN.astype(out_dtype)


def multiply_tokens(
  a_IM: jax.Array,
  sa_mI: jax.Array,
  b_JM: jax.Array,
  sb_mJ: jax.Array,
  c_IJ: jax.Array | None = None,
  *,
  num_sms: int | None = None,
) -> jax.Array:
  """a b^T over the tokens of the dequantised operands, FP32 [I, J], added to c."""
  del num_sms
  a_IM, b_JM = dequantize_tiles(a_IM, sa_mI), dequantize_tiles(b_JM, sb_mJ)
  dw_IJ = jnp.dot(a_IM, b_JM.T, precision=lax.Precision.HIGHEST)
  return dw_IJ if c_IJ is None else c_IJ + dw_IJ


def multiply_14_bit(
  a_MK: jax.Array,
  b_NK: jax.Array,
  *,
  promote_every: int | None = None,
  bits: int = 14,
  align_products: bool = True,
  acc_MN: jax.Array | None = None,
) -> jax.Array:
  """a b^T of FP32 operands as Hopper's FP8 tensor cores accumulate, emulated.

  An instruction adds 32 products to the accumulator: all are aligned to the largest
  exponent among them and cut to about 14 bits (truncated), then summed.

  Args:
    a_MK, b_NK: dequantised operands, FP32.
    promote_every: after so many terms the accumulator is added to an FP32 sum and
      starts afresh, as DeepSeek does every 128; None for never.
    bits: significant bits that alignment keeps.
    align_products: False cuts the sum of the 32 products instead of each, which costs
      32 times less memory and time and loses less than the hardware does.
    acc_MN: what the accumulator starts from, None for zeros.
  """
  (m, k), n = a_MK.shape, b_NK.shape[0]
  padding = ((0, 0), (0, -k % _WGMMA_DEPTH))
  a_sMD = jnp.pad(a_MK, padding).reshape(m, -1, _WGMMA_DEPTH).swapaxes(0, 1)
  b_sND = jnp.pad(b_NK, padding).reshape(n, -1, _WGMMA_DEPTH).swapaxes(0, 1)
  every = (promote_every or k + _WGMMA_DEPTH) // _WGMMA_DEPTH

  def instruction(carry, operands):
    sum_MN, acc_MN = carry
    s, a_MD, b_ND = operands
    if align_products:
      terms_TMN = jnp.einsum("md,nd->dmn", a_MD, b_ND)
    else:
      terms_TMN = jnp.dot(a_MD, b_ND.T, precision=lax.Precision.HIGHEST)[None]
    terms_TMN = jnp.concatenate([terms_TMN, acc_MN[None]])
    largest_MN = jnp.abs(terms_TMN).max(0)
    exponent_MN = jnp.frexp(largest_MN)[1]  # largest < 2^exponent
    unit_MN = jnp.ldexp(jnp.ones_like(largest_MN), exponent_MN - bits)
    acc_MN = jnp.trunc(terms_TMN / unit_MN).sum(0) * unit_MN
    promote = (s + 1) % every == 0
    sum_MN = jnp.where(promote, sum_MN + acc_MN, sum_MN)
    return (sum_MN, jnp.where(promote, 0, acc_MN)), None

  zero_MN = jnp.zeros((m, n), jnp.float32)
  steps = jnp.arange(len(a_sMD))
  start = zero_MN, zero_MN if acc_MN is None else acc_MN
  (sum_MN, acc_MN), _ = lax.scan(instruction, start, (steps, a_sMD, b_sND))
  return sum_MN + acc_MN


def dequantize_tiles(a_MK: jax.Array, sa_kM: jax.Array) -> jax.Array:
  """Codes with a scale each 1 x 128, times their scales, in FP32."""
  s_MK = jnp.repeat(sa_kM.T, BLOCK, axis=1, total_repeat_length=len(sa_kM) * BLOCK)
  return a_MK.astype(jnp.float32) * s_MK[:, : a_MK.shape[1]]


def dequantize_blocks(b_NK: jax.Array, sb_nk: jax.Array) -> jax.Array:
  """Codes with a scale each 128 x 128, times their scales, FP32; leading dims too."""
  n, k = b_NK.shape[-2:]
  s_NK = jnp.repeat(jnp.repeat(sb_nk, BLOCK, axis=-2), BLOCK, axis=-1)
  return b_NK.astype(jnp.float32) * s_NK[..., :n, :k]
