"""Grouped matrix product: each group of rows times its own expert's matrix.

The two products of an expert layer (DeepSeekMoE: DeepSeek-V3 report, section 2.1.2;
contiguous layout of DeepGEMM's grouped GEMM). Rows of group e stand together, groups
in order from row 0. Sizes are known only at run time; each is 0 or a multiple of
`row_multiple()`, and they sum to at most Z. What follows the last group is padding:
its content, NaN included, reaches neither outputs nor gradients, which are 0 there.

    y_ZF = grouped_matmul(x_ZD, w_EDF, group_sizes_E)

For decoding, `masked_matmul` takes groups of one capacity and the number of rows that
each holds. The products of block-scaled FP8 are in `fp8.py`, exported here.

Implementations (`impl`; None takes the platform's own, and `blocks` where the shape or
dtype does not suit it, with a warning):

| name | runs on | what |
|---|---|---|
| reference | everywhere | masked FP32 products, E times the work: the meaning |
| blocks | everywhere | XLA loop over blocks of rows: CPU's own |
| gpu | NVIDIA Hopper | Mosaic GPU kernels, BF16 |
| tpu | TPU | megablox, and a Pallas kernel for masked groups, BF16 and FP32 |

A named implementation works or raises; it never falls back to another.

Shapes: Z rows, E experts (groups), D input, F output; G groups of capacity C.
"""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.choose import choose, warn_of_fallback
from kernels_pallas.grouped_matmul import blocks, reference
from kernels_pallas.grouped_matmul.fp8 import (
  grouped_fp8_matmul,
  grouped_fp8_matmul_dw,
  masked_fp8_matmul,
)

__all__ = [
  "grouped_fp8_matmul",
  "grouped_fp8_matmul_dw",
  "grouped_matmul",
  "grouped_matmul_dw",
  "masked_fp8_matmul",
  "masked_matmul",
  "row_multiple",
]
_BY_PLATFORM = {"cpu": "blocks", "gpu": "gpu", "tpu": "tpu"}
_PORTABLE = ("reference", "blocks")


def row_multiple(impl: str | None = None) -> int:
  """What every group size must be a multiple of; for None, on this platform."""
  name = choose("grouped_matmul", impl, _BY_PLATFORM, _PORTABLE)
  return _implementation(name).ROW_MULTIPLE


def grouped_matmul(
  x_ZD: jax.Array,
  w_EDF: jax.Array,
  group_sizes_E: jax.Array,
  *,
  num_sms: int | None = None,
  impl: str | None = None,
) -> jax.Array:
  """Multiplies each group's rows by its matrix. Differentiable in x and w.

  Args:
    x_ZD: rows, BF16 or FP32.
    w_EDF: one matrix a group, dtype of x.
    group_sizes_E: int32 rows of each group, as the module's docstring says.
    num_sms: multiprocessors that the GPU's kernels use, None for all.
    impl: a name from the module's table, or None.

  Returns:
    y_ZF in x's dtype, accumulated in FP32. The gradient of w is accumulated in FP32
    and rounded once to w's dtype; `grouped_matmul_dw` gives it unrounded.

  Raises:
    ValueError: shapes or dtypes that do not fit together, or an implementation that
      does not run on this platform or with these shapes.
  """
  _check(x_ZD, w_EDF, group_sizes_E)
  impl = _choose(impl, x_ZD.dtype, w_EDF.shape[1], w_EDF.shape[2])
  return _grouped_matmul(x_ZD, w_EDF, group_sizes_E, impl, num_sms)


def grouped_matmul_dw(
  x_ZD: jax.Array,
  dy_ZF: jax.Array,
  group_sizes_E: jax.Array,
  c_EDF: jax.Array | None = None,
  *,
  dtype: jax.typing.DTypeLike = jnp.float32,
  num_sms: int | None = None,
  impl: str | None = None,
) -> jax.Array:
  """The gradient of w by itself: x^T dy summed over each group's rows, [E, D, F].

  For a caller who accumulates gradients in FP32 beside BF16 weights and writes the
  backward pass out. Groups of no rows get exactly 0. Where `c_EDF` is given, of
  `dtype`, the gradient is added to it; its buffer is reused where the caller donates
  it. Not itself differentiable.
  """
  impl = _choose(impl, x_ZD.dtype, x_ZD.shape[1], dy_ZF.shape[1])
  module, operands = _implementation(impl), (x_ZD, dy_ZF, group_sizes_E, dtype)
  if c_EDF is None:
    return module.multiply_rows(*operands, **_options(impl, num_sms))
  shape = (*group_sizes_E.shape, x_ZD.shape[1], dy_ZF.shape[1])
  if c_EDF.shape != shape or c_EDF.dtype != dtype:
    raise ValueError(
      f"grouped_matmul_dw needs c_EDF {jnp.dtype(dtype).name}{list(shape)}, "
      f"got {c_EDF.dtype}{list(c_EDF.shape)}"
    )
  if impl == "gpu":
    return module.multiply_rows(*operands, add_to=c_EDF, num_sms=num_sms)
  return c_EDF + module.multiply_rows(*operands)


def masked_matmul(
  x_GCD: jax.Array,
  w_GDF: jax.Array,
  counts_G: jax.Array,
  *,
  num_sms: int | None = None,
  impl: str | None = None,
) -> jax.Array:
  """The first counts_G rows of each group times its matrix, 0 in the others.

  Args:
    x_GCD: rows in groups of one capacity C, BF16 or FP32; content from a group's count
      on, NaN included, reaches no output. The GPU's kernel takes BF16 and wants C to be
      a multiple of 8.
    w_GDF: one matrix a group, dtype of x.
    counts_G: integer rows of each group that hold data, from 0 to C.
    num_sms: multiprocessors that the GPU's kernel uses, None for all.
    impl: a name from the module's table, or None.

  Returns:
    y_GCF in x's dtype, accumulated in FP32.

  Raises:
    ValueError: as grouped_matmul.
  """
  if x_GCD.ndim != 3 or w_GDF.shape[:2] != (x_GCD.shape[0], x_GCD.shape[2]):
    raise ValueError(
      "masked_matmul needs x [G, C, D] and w [G, D, F], "
      f"got {list(x_GCD.shape)}, {list(w_GDF.shape)}"
    )
  _check(x_GCD[0], w_GDF, counts_G)
  name = choose("masked_matmul", impl, _BY_PLATFORM, _PORTABLE)
  module, reason = _implementation(name), None
  if name not in _PORTABLE:
    reason = module.unsupported(x_GCD.dtype, *w_GDF.shape[1:])
  if name == "gpu" and reason is None and x_GCD.shape[1] % 8:
    reason = f"needs a capacity that is a multiple of 8, got {x_GCD.shape[1]}"
  if reason is None:
    return module.multiply_masked(x_GCD, w_GDF, counts_G, **_options(name, num_sms))
  if impl is not None:
    raise ValueError(f"masked_matmul: impl={impl!r} {reason}, or pass impl='blocks'")
  warn_of_fallback("masked_matmul", reason, "blocks")
  return blocks.multiply_masked(x_GCD, w_GDF, counts_G)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped_matmul(x_ZD, w_EDF, sizes_E, impl, num_sms):
  multiply = _implementation(impl).multiply
  return multiply(x_ZD, w_EDF, sizes_E, **_options(impl, num_sms))


def _forward(x_ZD, w_EDF, sizes_E, impl, num_sms):
  y_ZF = _grouped_matmul(x_ZD, w_EDF, sizes_E, impl, num_sms)
  return y_ZF, (x_ZD, w_EDF, sizes_E)


def _backward(impl, num_sms, residuals, dy_ZF):
  x_ZD, w_EDF, sizes_E = residuals
  module, options = _implementation(impl), _options(impl, num_sms)
  dx_ZD = module.multiply(dy_ZF, w_EDF, sizes_E, transpose_w=True, **options)
  dw_EDF = module.multiply_rows(x_ZD, dy_ZF, sizes_E, w_EDF.dtype, **options)
  return dx_ZD, dw_EDF, None


def _options(impl: str, num_sms: int | None) -> dict[str, Any]:
  return {"num_sms": num_sms} if impl == "gpu" else {}


_grouped_matmul.defvjp(_forward, _backward)


def _implementation(impl: str) -> ModuleType:
  """The module behind a name; kernels are imported when first asked for."""
  if impl == "gpu":
    from kernels_pallas.grouped_matmul import gpu

    return gpu
  if impl == "tpu":
    from kernels_pallas.grouped_matmul import tpu

    return tpu
  return reference if impl == "reference" else blocks


def _choose(impl: str | None, dtype: jax.typing.DTypeLike, d: int, f: int) -> str:
  """Settles the name, and whether its kernels take these shapes."""
  name = choose("grouped_matmul", impl, _BY_PLATFORM, _PORTABLE)
  if name in _PORTABLE:
    return name
  reason = _implementation(name).unsupported(dtype, d, f)
  if reason is None:
    return name
  if impl is None:
    warn_of_fallback("grouped_matmul", reason, "blocks")
    return "blocks"
  raise ValueError(f"grouped_matmul: impl={impl!r} {reason}, or pass impl='blocks'")


def _check(x_ZD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> None:
  if x_ZD.ndim != 2 or w_EDF.ndim != 3 or x_ZD.shape[1] != w_EDF.shape[1]:
    raise ValueError(
      f"grouped_matmul needs x [Z, D] and w [E, D, F], got {x_ZD.shape}, {w_EDF.shape}"
    )
  if sizes_E.shape != w_EDF.shape[:1] or not jnp.issubdtype(sizes_E.dtype, jnp.integer):
    raise ValueError(
      f"grouped_matmul needs {w_EDF.shape[0]} integer group sizes, "
      f"got {sizes_E.dtype}{list(sizes_E.shape)}"
    )
  if x_ZD.dtype != w_EDF.dtype or x_ZD.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(
      "grouped_matmul needs x and w both bfloat16 or both float32, "
      f"got {x_ZD.dtype} and {w_EDF.dtype}: cast one"
    )
