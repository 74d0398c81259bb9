"""Grouped products of block-scaled FP8: the experts' fprop, dgrad and wgrad.

As `kernels_pallas.fp8_matmul`, group by group: e4m3 codes, FP32 scales, tiles of
1 x 128 along the contraction for activations and gradients, blocks of 128 x 128 for
weights, FP32 promotion each 128 (DeepSeek-V3 report, section 3.3; the contiguous,
masked and K-grouped products of DeepGEMM).

    c_ZN   = grouped_fp8_matmul(a_ZK, sa_kZ, b_ENK, sb_Enk, group_sizes_E)
    c_EIJ  = grouped_fp8_matmul_dw(a_IZ, sa_zI, b_JZ, sb_zJ, group_sizes_E, c_EIJ)
    c_GCN  = masked_fp8_matmul(a_GCK, sa_kGC, b_GNK, sb_Gnk, counts_G)

Group sizes are 0 or multiples of 128, whatever the implementation, for a tile of the
weight gradient spans 128 rows. What follows the last group, and a group's rows from
its count on, is padding: its content, NaN included, reaches no output, and outputs
are 0 there. Not differentiable: they are what a custom backward pass is made of.

Implementations are those of `grouped_matmul`; `reference` and `blocks` dequantise and
multiply in FP32.

Shapes: Z rows, E experts (groups), K contraction, N output, I and J the outputs of a
weight gradient, G groups of capacity C; lower case: that dimension / 128, rounded up.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.choose import choose, warn_of_fallback
from kernels_pallas.fp8_matmul import blocks as scale_blocks
from kernels_pallas.fp8_matmul import check_operand, check_scales
from kernels_pallas.fp8_matmul.reference import dequantize_blocks, dequantize_tiles
from kernels_pallas.grouped_matmul import blocks, reference

ROW_MULTIPLE = 128
_BY_PLATFORM = {"cpu": "blocks", "gpu": "gpu", "tpu": "tpu"}
_PORTABLE = {"reference": reference, "blocks": blocks}


def grouped_fp8_matmul(
  a_ZK: jax.Array,
  sa_kZ: jax.Array,
  b_ENK: jax.Array,
  sb_Enk: jax.Array,
  group_sizes_E: jax.Array,
  *,
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  num_sms: int | None = None,
  impl: str | None = None,
) -> jax.Array:
  """Each row times its group's matrix, both dequantised: [Z, N].

  Args:
    a_ZK, sa_kZ: codes of the rows and their scales, contraction first.
    b_ENK, sb_Enk: codes and scales of one matrix a group.
    group_sizes_E: integer rows of each group, 0 or multiples of 128.
    out_dtype: bfloat16 or float32.
    num_sms: multiprocessors that the GPU's kernel uses, None for all.
    impl: a name from `grouped_matmul`'s table, or None.

  Raises:
    ValueError: shapes or dtypes that do not fit together, or an implementation that
      does not run on this platform or with these shapes.
  """
  op, (rows, k), (experts, n) = "grouped_fp8_matmul", a_ZK.shape, b_ENK.shape[:2]
  check_operand(op, "a_ZK", a_ZK, (rows, k))
  check_operand(op, "b_ENK", b_ENK, (experts, n, k))
  check_scales(op, "sa_kZ", sa_kZ, (scale_blocks(k), rows))
  check_scales(op, "sb_Enk", sb_Enk, (experts, scale_blocks(n), scale_blocks(k)))
  _check_sizes(op, group_sizes_E, experts)
  name, module = _choose(op, impl, n, k)
  if name in _PORTABLE:
    a_ZK, b_ENK = dequantize_tiles(a_ZK, sa_kZ), dequantize_blocks(b_ENK, sb_Enk)
    c_ZN = module.multiply(a_ZK, b_ENK, group_sizes_E, transpose_w=True)
    return c_ZN.astype(out_dtype)
  return module.multiply(
    a_ZK,
    sa_kZ,
    b_ENK,
    sb_Enk,
    group_sizes_E,
    out_dtype=out_dtype,
    **_options(name, num_sms),
  )


def grouped_fp8_matmul_dw(
  a_IZ: jax.Array,
  sa_zI: jax.Array,
  b_JZ: jax.Array,
  sb_zJ: jax.Array,
  group_sizes_E: jax.Array,
  c_EIJ: jax.Array | None = None,
  *,
  num_sms: int | None = None,
  impl: str | None = None,
) -> jax.Array:
  """The gradients of the groups' weights: a b^T over each group's rows, added to c.

  Args:
    a_IZ, b_JZ: codes, rows last.
    sa_zI, sb_zJ: FP32 scale of each 128 rows.
    group_sizes_E: integer rows of each group, 0 or multiples of 128.
    c_EIJ: FP32 sums to add to; their buffer is reused where the caller donates it.
    num_sms, impl: as grouped_fp8_matmul.

  Returns:
    FP32 [E, I, J]; groups of no rows add nothing.

  Raises:
    ValueError: as grouped_fp8_matmul.
  """
  op, (i, rows), j = "grouped_fp8_matmul_dw", a_IZ.shape, b_JZ.shape[0]
  check_operand(op, "a_IZ", a_IZ, (i, rows))
  check_operand(op, "b_JZ", b_JZ, (j, rows))
  check_scales(op, "sa_zI", sa_zI, (scale_blocks(rows), i))
  check_scales(op, "sb_zJ", sb_zJ, (scale_blocks(rows), j))
  experts = group_sizes_E.shape[0]
  _check_sizes(op, group_sizes_E, experts)
  if c_EIJ is not None:
    check_scales(op, "c_EIJ", c_EIJ, (experts, i, j))
  name, module = _choose(op, impl, i, j)
  if name in _PORTABLE:
    a_ZI = dequantize_tiles(a_IZ, sa_zI).T
    b_ZJ = dequantize_tiles(b_JZ, sb_zJ).T
    dw_EIJ = module.multiply_rows(a_ZI, b_ZJ, group_sizes_E, jnp.float32)
    return dw_EIJ if c_EIJ is None else c_EIJ + dw_EIJ
  return module.multiply_rows(
    a_IZ, sa_zI, b_JZ, sb_zJ, group_sizes_E, c_EIJ, **_options(name, num_sms)
  )


def masked_fp8_matmul(
  a_GCK: jax.Array,
  sa_kGC: jax.Array,
  b_GNK: jax.Array,
  sb_Gnk: jax.Array,
  counts_G: jax.Array,
  *,
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  num_sms: int | None = None,
  impl: str | None = None,
) -> jax.Array:
  """Groups of one capacity, as decoding dispatches: the first counts_G rows of each.

  Args:
    a_GCK, sa_kGC: codes of the rows and their scales, contraction first. The GPU's
      kernel wants a capacity C that is a multiple of 8.
    b_GNK, sb_Gnk: codes and scales of one matrix a group.
    counts_G: integer rows of each group that hold data, from 0 to C.
    out_dtype, num_sms: as grouped_fp8_matmul.
    impl: a name from `grouped_matmul`'s table, or None.

  Returns:
    [G, C, N], 0 from each group's count on.

  Raises:
    ValueError: as grouped_fp8_matmul.
  """
  op, (groups, capacity, k), n = "masked_fp8_matmul", a_GCK.shape, b_GNK.shape[1]
  check_operand(op, "a_GCK", a_GCK, (groups, capacity, k))
  check_operand(op, "b_GNK", b_GNK, (groups, n, k))
  check_scales(op, "sa_kGC", sa_kGC, (scale_blocks(k), groups, capacity))
  check_scales(op, "sb_Gnk", sb_Gnk, (groups, scale_blocks(n), scale_blocks(k)))
  _check_sizes(op, counts_G, groups)
  name, module = _choose(op, impl, n, k, capacity)
  if name not in _PORTABLE:
    return module.multiply_masked(
      a_GCK,
      sa_kGC,
      b_GNK,
      sb_Gnk,
      counts_G,
      out_dtype=out_dtype,
      **_options(name, num_sms),
    )
  a_GCK = jax.vmap(dequantize_tiles, (0, 1))(a_GCK, sa_kGC)
  b_GNK = dequantize_blocks(b_GNK, sb_Gnk)
  c_GCN = module.multiply_masked(a_GCK, b_GNK, counts_G, transpose_w=True)
  return c_GCN.astype(out_dtype)


def _choose(
  op: str, impl: str | None, n: int, k: int, capacity: int = 8
) -> tuple[str, ModuleType]:
  """Settles the implementation, and whether its kernels take these shapes."""
  name = choose(op, impl, _BY_PLATFORM, _PORTABLE)
  if name in _PORTABLE:
    return name, _PORTABLE[name]
  module = _implementation(name)
  reason = module.unsupported(n, k, capacity)
  if reason is None:
    return name, module
  if impl is None:
    warn_of_fallback(op, reason, "blocks")
    return "blocks", blocks
  raise ValueError(f"{op}: impl={impl!r} {reason}, or pass impl='blocks'")


def _implementation(name: str) -> ModuleType:
  """The module behind a name; kernels are imported when first asked for."""
  if name == "gpu":
    from kernels_pallas.grouped_matmul import gpu_fp8

    return gpu_fp8
  from kernels_pallas.grouped_matmul import tpu_fp8

  return tpu_fp8


def _options(name: str, num_sms: int | None) -> dict[str, Any]:
  return {"num_sms": num_sms} if name == "gpu" else {}


def _check_sizes(op: str, sizes_E: jax.Array, experts: int) -> None:
  if sizes_E.shape != (experts,) or not jnp.issubdtype(sizes_E.dtype, jnp.integer):
    raise ValueError(
      f"{op} needs {experts} integer group sizes, "
      f"got {sizes_E.dtype}{list(sizes_E.shape)}"
    )
