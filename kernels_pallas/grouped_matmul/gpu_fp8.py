"""Grouped FP8 products on NVIDIA Hopper: `fp8_matmul`'s kernel with tables of groups.

Shapes: as fp8.py. `sum_bits` is as `fp8_matmul.persistent.run` has it.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.fp8_matmul import gpu, tilings
from kernels_pallas.fp8_matmul.persistent import Tiling
from kernels_pallas.grouped_matmul import schedule


def unsupported(n: int, k: int, capacity: int = 8) -> str | None:
  """Why these kernels cannot multiply so, or None when they can."""
  if capacity % 8:
    return f"needs a capacity that is a multiple of 8, got {capacity}"
  return gpu.unsupported(n, k)


def multiply(
  a_ZK: jax.Array,
  sa_kZ: jax.Array,
  b_ENK: jax.Array,
  sb_Enk: jax.Array,
  sizes_E: jax.Array,
  *,
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  num_sms: int | None = None,
  tiling: Tiling | None = None,
  sum_bits: int | None = None,
  interpret=None,
) -> jax.Array:
  """Each row times its group's matrix, [Z, N]; 0 in rows of no group."""
  rows, (experts, columns) = a_ZK.shape[0], b_ENK.shape[:2]
  tiling = tiling or tilings.grouped(rows, columns, experts)
  if tiling.warpgroups == 2:
    blocks = schedule.contiguous(sizes_E, rows)
  else:
    blocks = schedule.tall(sizes_E, rows)
  options = {"out_dtype": out_dtype, "num_sms": num_sms, "tiling": tiling}
  return gpu.multiply(
    a_ZK,
    sa_kZ,
    b_ENK,
    sb_Enk,
    blocks,
    sum_bits=sum_bits,
    interpret=interpret,
    **options,
  )


def multiply_rows(
  a_IZ: jax.Array,
  sa_zI: jax.Array,
  b_JZ: jax.Array,
  sb_zJ: jax.Array,
  sizes_E: jax.Array,
  c_EIJ: jax.Array | None = None,
  *,
  num_sms: int | None = None,
  tiling: Tiling | None = None,
  sum_bits: int | None = None,
  interpret=None,
) -> jax.Array:
  """a b^T over each group's rows, FP32 [E, I, J], added to c."""
  spans_2E, options = schedule.spans(sizes_E), {"num_sms": num_sms, "tiling": tiling}
  return gpu.multiply_tokens(
    a_IZ,
    sa_zI,
    b_JZ,
    sb_zJ,
    spans_2E,
    c_EIJ,
    sum_bits=sum_bits,
    interpret=interpret,
    **options,
  )


def multiply_masked(
  a_GCK: jax.Array,
  sa_kGC: jax.Array,
  b_GNK: jax.Array,
  sb_Gnk: jax.Array,
  counts_G: jax.Array,
  *,
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  num_sms: int | None = None,
  tiling: Tiling | None = None,
  interpret=None,
) -> jax.Array:
  """The first counts_G rows of each group times its matrix, 0 in the others."""
  blocks_2m = schedule.masked(counts_G, a_GCK.shape[1])
  options = {"out_dtype": out_dtype, "num_sms": num_sms, "tiling": tiling}
  return gpu.multiply_groups(
    a_GCK, sa_kGC, b_GNK, sb_Gnk, blocks_2m, interpret=interpret, **options
  )
