"""Grouped FP8 products on TPU: `fp8_matmul`'s kernel with tables of groups.

Shapes: as fp8.py.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.fp8_matmul import tpu
from kernels_pallas.fp8_matmul.tpu import BLOCK
from kernels_pallas.grouped_matmul import schedule


def unsupported(n: int, k: int, capacity: int = BLOCK) -> str | None:
  """Why these kernels cannot multiply so, or None when they can."""
  del capacity  # padded to whole blocks
  return tpu.unsupported(n, k)


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


def multiply_masked(
  a_GCK: jax.Array,
  sa_kGC: jax.Array,
  b_GNK: jax.Array,
  sb_Gnk: jax.Array,
  counts_G: jax.Array,
  *,
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  interpret: bool = False,
) -> jax.Array:
  """The first counts_G rows of each group times its matrix, 0 in the others."""
  groups, capacity, k = a_GCK.shape
  missing = -capacity % BLOCK
  if missing:
    a_GCK = jnp.pad(a_GCK, ((0, 0), (0, missing), (0, 0)))
    sa_kGC = jnp.pad(sa_kGC, ((0, 0), (0, 0), (0, missing)))
  padded = capacity + missing
  group_m, _ = schedule.masked(counts_G, padded)
  c_ZN = tpu.multiply(
    a_GCK.reshape(-1, k),
    sa_kGC.reshape(-1, groups * padded),
    b_GNK,
    sb_Gnk,
    group_m,
    out_dtype=out_dtype,
    interpret=interpret,
  )
  own_GC = jnp.arange(capacity) < counts_G[:, None]
  c_GCN = c_ZN.reshape(groups, padded, -1)[:, :capacity]
  return jnp.where(own_GC[:, :, None], c_GCN, 0)
