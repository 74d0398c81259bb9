"""Grouped matrix product: each group of rows times its own expert's matrix.

The two products of an expert layer (DeepSeekMoE: DeepSeek-V3 report, section 2.1.2;
contiguous layout of DeepGEMM's grouped GEMM). Rows of group e stand together, groups
in order from row 0. Sizes are known only at run time; each is 0 or a multiple of
`row_multiple()`, and they sum to at most Z. What follows the last group is padding:
its content, NaN included, reaches neither outputs nor gradients, which are 0 there.

    y_ZF = grouped_matmul(x_ZD, w_EDF, group_sizes_E)

Implementations (`impl`; None takes the platform's own, and `blocks` where the shape or
dtype does not suit it):

| name | runs on | what |
|---|---|---|
| reference | everywhere | masked FP32 products, E times the work: the meaning |
| blocks | everywhere | XLA loop over blocks of rows: CPU's own |
| gpu | NVIDIA Hopper | Mosaic GPU kernels, BF16 |
| tpu | TPU | megablox, BF16 and FP32 |

A named implementation works or raises; it never falls back to another.

Shapes: Z rows, E experts (groups), D input, F output.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp

from kernels_pallas.choose import choose
from kernels_pallas.grouped_matmul import blocks, reference

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
  impl: str | None = None,
) -> jax.Array:
  """Multiplies each group's rows by its matrix. Differentiable in x and w.

  Args:
    x_ZD: rows, BF16 or FP32.
    w_EDF: one matrix a group, dtype of x.
    group_sizes_E: int32 rows of each group, as the module's docstring says.
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
  return _grouped_matmul(x_ZD, w_EDF, group_sizes_E, impl)


def grouped_matmul_dw(
  x_ZD: jax.Array,
  dy_ZF: jax.Array,
  group_sizes_E: jax.Array,
  *,
  dtype: jax.typing.DTypeLike = jnp.float32,
  impl: str | None = None,
) -> jax.Array:
  """The gradient of w by itself: x^T dy summed over each group's rows, [E, D, F].

  For a caller who accumulates gradients in FP32 beside BF16 weights and writes the
  backward pass out. Groups of no rows get exactly 0. Not itself differentiable.
  """
  impl = _choose(impl, x_ZD.dtype, x_ZD.shape[1], dy_ZF.shape[1])
  return _implementation(impl).multiply_rows(x_ZD, dy_ZF, group_sizes_E, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x_ZD, w_EDF, sizes_E, impl):
  return _implementation(impl).multiply(x_ZD, w_EDF, sizes_E)


def _forward(x_ZD, w_EDF, sizes_E, impl):
  return _grouped_matmul(x_ZD, w_EDF, sizes_E, impl), (x_ZD, w_EDF, sizes_E)


def _backward(impl, residuals, dy_ZF):
  x_ZD, w_EDF, sizes_E = residuals
  module = _implementation(impl)
  dx_ZD = module.multiply(dy_ZF, w_EDF, sizes_E, transpose_w=True)
  dw_EDF = module.multiply_rows(x_ZD, dy_ZF, sizes_E, w_EDF.dtype)
  return dx_ZD, dw_EDF, None


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
