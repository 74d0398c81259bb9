"""Grouped FP8 products on TPU: `fp8_matmul`'s kernel with tables of groups.

Shapes: as fp8.py.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.fp8_matmul import tpu
from kernels_pallas.grouped_matmul import schedule

unsupported = tpu.unsupported


def multiply(
  a_ZK: jax.Array,
  sa_kZ: jax.Array,
  b_ENK: jax.Array,
  sb_Enk: jax.Array,
  sizes_E: jax.Array,
  *,
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  interpret: bool = False,
) -> jax.Array:
  """Each row times its group's matrix, [Z, N]; 0 in rows of no group."""
  [group_m] = schedule.contiguous(sizes_E, a_ZK.shape[0])
  options = {"out_dtype": out_dtype, "interpret": interpret}
  return tpu.multiply(a_ZK, sa_kZ, b_ENK, sb_Enk, group_m, **options)


def multiply_rows(
  a_IZ: jax.Array,
  sa_zI: jax.Array,
  b_JZ: jax.Array,
  sb_zJ: jax.Array,
  sizes_E: jax.Array,
  c_EIJ: jax.Array | None = None,
  *,
  interpret: bool = False,
) -> jax.Array:
  """a b^T over each group's rows, FP32 [E, I, J], added to c."""
  options = {"interpret": interpret}
  return tpu.multiply_tokens(a_IZ, sa_zI, b_JZ, sb_zJ, sizes_E, c_EIJ, **options)
