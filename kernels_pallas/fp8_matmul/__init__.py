"""Block-scaled FP8 matrix products: activations times weights, and weight gradients.

Operands are e4m3 codes with FP32 scales, as DeepSeek trains (DeepSeek-V3 report,
section 3.3): activations and gradients in tiles of 1 x 128 along the contraction,
weights in blocks of 128 x 128. The tensor cores' sum of each 128 of the contraction is
promoted to FP32 before it is scaled and added up. Both operands have the contracted
dimension last, for Hopper's 8-bit instructions take no other order.

    c_MN = fp8_matmul(a_MK, sa_kM, b_NK, sb_nk)                 # fprop, dgrad
    c_IJ = fp8_matmul_dw(a_IM, sa_mI, b_JM, sb_mJ, c_IJ)        # wgrad, added to c

Scales of tiles stand with the contraction first: the scales that one step of the
kernel needs lie side by side. Neither product is differentiable: they are what a
custom backward pass is made of.

Implementations (`impl`; None takes the platform's own, and `reference` where the shape
does not suit it, with a warning):

| name | runs on | what |
|---|---|---|
| reference | everywhere | dequantise, then an FP32 product: the meaning, CPU's own |
| gpu | NVIDIA Hopper | Mosaic GPU kernels |
| tpu | TPU | Pallas kernels; codes are multiplied as BF16, which holds them exactly |

A named implementation works or raises; it never falls back to another.

Shapes: M rows (tokens), K contraction, N output; I and J the two outputs of a weight
gradient; a lower-case letter is that dimension / 128, rounded up.
"""

from types import ModuleType

import jax
import jax.numpy as jnp

from kernels_pallas.choose import choose, warn_of_fallback
from kernels_pallas.fp8_matmul import reference

BLOCK = reference.BLOCK
_BY_PLATFORM = {"cpu": "reference", "gpu": "gpu", "tpu": "tpu"}
_PORTABLE = ("reference",)


def fp8_matmul(
  a_MK: jax.Array,
  sa_kM: jax.Array,
  b_NK: jax.Array,
  sb_nk: jax.Array,
  *,
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  num_sms: int | None = None,
  impl: str | None = None,
) -> jax.Array:
  """Activations times weights: a b^T of the dequantised operands.

  Args:
    a_MK: codes of the activations, float8_e4m3fn, any M.
    sa_kM: FP32 scale of each row's 128 of K; a ragged last tile is allowed.
    b_NK: codes of the weights.
    sb_nk: FP32 scale of each 128 x 128 block.
    out_dtype: bfloat16 or float32.
    num_sms: multiprocessors that the GPU's kernel uses, None for all. At most 256 rows
      of a long K are added up in another order with all.
    impl: a name from the module's table, or None.

  Returns:
    c_MN, summed in FP32 and rounded once to out_dtype.

  Raises:
    ValueError: shapes or dtypes that do not fit together, or an implementation that
      does not run on this platform or with these shapes.
  """
  (m, k), n = a_MK.shape, b_NK.shape[0]
  check_operand("fp8_matmul", "a_MK", a_MK, (m, k))
  check_operand("fp8_matmul", "b_NK", b_NK, (n, k))
  check_scales("fp8_matmul", "sa_kM", sa_kM, (blocks(k), m))
  check_scales("fp8_matmul", "sb_nk", sb_nk, (blocks(n), blocks(k)))
  module = _choose("fp8_matmul", impl, n, k)
  if module is reference:
    return reference.multiply(a_MK, sa_kM, b_NK, sb_nk, out_dtype=out_dtype)
  c_MN = module.multiply(
    a_MK, sa_kM, b_NK[None], sb_nk[None], out_dtype=out_dtype, num_sms=num_sms
  )
  return c_MN


def fp8_matmul_dw(
  a_IM: jax.Array,
  sa_mI: jax.Array,
  b_JM: jax.Array,
  sb_mJ: jax.Array,
  c_IJ: jax.Array | None = None,
  *,
  num_sms: int | None = None,
  impl: str | None = None,
) -> jax.Array:
  """The gradient of a weight: a b^T over the tokens M, added to c_IJ.

  Args:
    a_IM, b_JM: codes, float8_e4m3fn, tokens last. The GPU's kernel pads M to a
      multiple of 128, which costs a copy where it is none.
    sa_mI, sb_mJ: FP32 scale of each row's 128 tokens.
    c_IJ: FP32 sums to add to; its buffer is reused where the caller donates it.
    num_sms: multiprocessors that the GPU's kernel uses, None for all.
    impl: a name from the module's table, or None.

  Returns:
    FP32 [I, J].

  Raises:
    ValueError: as fp8_matmul.
  """
  (i, m), j = a_IM.shape, b_JM.shape[0]
  check_operand("fp8_matmul_dw", "a_IM", a_IM, (i, m))
  check_operand("fp8_matmul_dw", "b_JM", b_JM, (j, m))
  check_scales("fp8_matmul_dw", "sa_mI", sa_mI, (blocks(m), i))
  check_scales("fp8_matmul_dw", "sb_mJ", sb_mJ, (blocks(m), j))
  if c_IJ is not None:
    check_scales("fp8_matmul_dw", "c_IJ", c_IJ, (i, j))
  module = _choose("fp8_matmul_dw", impl, i, j)
  if module is reference:
    return reference.multiply_tokens(a_IM, sa_mI, b_JM, sb_mJ, c_IJ)
  c_1IJ = None if c_IJ is None else c_IJ[None]
  return module.multiply_tokens(a_IM, sa_mI, b_JM, sb_mJ, c_EIJ=c_1IJ, num_sms=num_sms)[
    0
  ]


def blocks(size: int) -> int:
  """Scales that a dimension of so many elements has."""
  return -(-size // BLOCK)


def check_operand(op: str, name: str, codes: jax.Array, shape: tuple[int, ...]) -> None:
  """Raises where codes are not e4m3 of this shape."""
  if codes.dtype != jnp.float8_e4m3fn or codes.shape != shape:
    raise ValueError(
      f"{op} needs {name} float8_e4m3fn{list(shape)}, "
      f"got {codes.dtype}{list(codes.shape)}"
    )


def check_scales(op: str, name: str, scales: jax.Array, shape: tuple[int, ...]) -> None:
  """Raises where scales (or sums) are not FP32 of this shape."""
  if scales.dtype != jnp.float32 or scales.shape != shape:
    raise ValueError(
      f"{op} needs {name} float32{list(shape)}, got {scales.dtype}{list(scales.shape)}"
    )


def _choose(op: str, impl: str | None, n: int, k: int) -> ModuleType:
  """Settles the implementation, and whether its kernels take these shapes."""
  name = choose(op, impl, _BY_PLATFORM, _PORTABLE)
  module = _implementation(name)
  reason = module.unsupported(n, k)
  if reason is None:
    return module
  if impl is None:
    warn_of_fallback(op, reason, "reference")
    return reference
  raise ValueError(f"{op}: impl={impl!r} {reason}, or pass impl='reference'")


def _implementation(name: str) -> ModuleType:
  """The module behind a name; kernels are imported when first asked for."""
  if name == "gpu":
    from kernels_pallas.fp8_matmul import gpu

    return gpu
  if name == "tpu":
    from kernels_pallas.fp8_matmul import tpu

    return tpu
  return reference
