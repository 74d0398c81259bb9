"""Emulated FP8 products by the kernels for Hopper: any tiling, any FP8 format.

The loops of `emulation.py` over experts take seconds a step on a GPU. The kernels know
tiles of E4M3 only, but not where their scales come from: one a tensor or one a block
is as good. An operand in E5M2 is exactly the sum of two in E4M3, so two products. What
sums lose without promotion is cut from them every 128 of the contraction, where the
emulation cuts every 32; in between the tensor cores cut by themselves.

Shape suffixes: M rows, K contraction, N output, I and J outputs of a weight gradient,
E experts; a lower-case letter is that dimension divided by 128.
"""

import functools
import operator

import jax
import jax.numpy as jnp

from kernels_pallas.choose import target_platform

Tiled = tuple[jax.Array, jax.Array]

_UNPROMOTED_BITS = 14  # DeepSeek-V3 report, section 3.3.2


def can_multiply(n: int, k: int) -> bool:
  """Whether this is traced for a Hopper GPU, and its kernels take [M, K] by [N, K]."""
  if target_platform() != "gpu":
    return False
  from kernels_pallas.fp8_matmul import gpu

  hopper = True  # of a GPU that is compiled for elsewhere, nothing is known
  if jax.default_backend() == "gpu":
    hopper = jax.devices()[0].compute_capability.startswith("9.")
  return hopper and gpu.unsupported(n, k) is None


def multiply(
  a: Tiled,
  b: Tiled,
  group_sizes_E: jax.Array | None,
  promotion: bool,
  interpret=None,
) -> jax.Array:
  """As `emulation.multiply`."""
  from kernels_pallas.fp8_matmul import gpu
  from kernels_pallas.grouped_matmul import gpu_fp8

  def product(part: Tiled) -> jax.Array:
    dtype, bits = jnp.float32, _sum_bits(promotion)
    if group_sizes_E is None:
      w = b[0][None], b[1][None]
      return gpu.multiply(
        *part, *w, out_dtype=dtype, sum_bits=bits, interpret=interpret
      )
    return gpu_fp8.multiply(
      *part, *b, group_sizes_E, out_dtype=dtype, sum_bits=bits, interpret=interpret
    )

  return functools.reduce(operator.add, map(product, in_e4m3(a)))


def weight_gradient(
  a: Tiled,
  b: Tiled,
  group_sizes_E: jax.Array | None,
  promotion: bool,
  interpret=None,
) -> jax.Array:
  """As `emulation.weight_gradient`; the first operand in E4M3."""
  from kernels_pallas.fp8_matmul import gpu
  from kernels_pallas.grouped_matmul import gpu_fp8

  def product(part: Tiled) -> jax.Array:
    bits = _sum_bits(promotion)
    if group_sizes_E is None:
      return gpu.multiply_tokens(*a, *part, sum_bits=bits, interpret=interpret)[0]
    return gpu_fp8.multiply_rows(
      *a, *part, group_sizes_E, sum_bits=bits, interpret=interpret
    )

  return functools.reduce(operator.add, map(product, in_e4m3(b)))


def in_e4m3(tiles: Tiled) -> list[Tiled]:
  """Operands in E4M3 whose sum is this one, exactly.

  E5M2 has 30 binades with two bits after the leading one. E4M3 holds such numbers in
  the 16 binades from 2^-7 on, so the upper half, from 1 on, and the lower half find
  room in an operand each, with scales of their own; the other operand has a zero there.
  """
  codes, scales = tiles
  if codes.dtype == jnp.float8_e4m3fn:
    return [tiles]
  wide = codes.astype(jnp.float32)
  upper = jnp.abs(wide) >= 1
  halves = ((upper, 7), (~upper, -9))
  return [
    (
      jnp.where(mine, wide * 2.0**-power, 0).astype(jnp.float8_e4m3fn),
      scales * 2.0**power,
    )
    for mine, power in halves
  ]


def _sum_bits(promotion: bool) -> int | None:
  return None if promotion else _UNPROMOTED_BITS
