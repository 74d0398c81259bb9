"""FP8 quantisation by tiles, fused SwiGLU, and packed E5M6: DeepSeek-V3's formats.

DeepSeek-V3 report, section 3.3.2: activations are scaled by 1x128 tiles, along the
columns for a product over columns and along the rows (128x1) for the weight gradient,
which contracts over rows; weights by 128x128 blocks. For a tile of largest magnitude
amax,

    s = max(amax, 1e-4) / 448        code = e4m3(clamp(x / s, -448, 448))

with both quotients rounded once in FP32 and the cast to nearest even (448 is E4M3's
largest value; `dtype=jnp.float8_e5m2` puts 57344 in its place). `power_of_two=True`
raises s to the next power of two, as V3 does where a tensor is tiled twice: exponents
then move without rounding. A tile that holds a NaN or an infinity gets scale NaN and
codes NaN, so that a training step sees it. Ragged edges count as padded with zeros.

8-bit wgmma wants both operands contiguous along the contraction, hence the transposed
codes of the column form. Scales are FP32 with the tile's index first (DeepGEMM's
MN-major layout). A scale multiplies: x ~ code * s.

| function | writes |
|---|---|
| quantize_rows | 1x128 tiles: q_MK, s_kM |
| quantize_columns | 128x1 tiles, transposed: q_KM, s_mK |
| quantize_both | both, reading x once |
| requantize_columns | 128x1 tiles from saved 1x128 tiles |
| quantize_blocks | 128x128 blocks of a weight and of its transpose |
| quantize_tensor | one scale for all (ablation) |
| swiglu_quantize | silu(a) u gate, in rows or both; and h in rows |
| swiglu_quantize_backward | its gradient in both, that of the gate, and y in columns |
| pack_e5m6, unpack_e5m6 | 12-bit floats, for the input of attention's output linear |

Implementations (`impl`; None takes the platform's own, and `reference` where shape or
dtype do not suit that):

| name | runs on | what |
|---|---|---|
| reference | everywhere | plain jnp: the meaning, and what CPU runs |
| gpu | NVIDIA Hopper | Mosaic GPU kernels for all that makes FP8 of BF16 or of FP8 |
| tpu | TPU | a Pallas kernel for rows, columns and both |

The rest is left to XLA, as is what `unsupported` of a kernel's module refuses: `gpu`
FP32 and dimensions that are no multiples of 64, `tpu` those that are none of 128.

Shapes: M rows, K columns, E experts, N columns of a weight, Z dispatched rows, F
hidden; a lower-case letter is that dimension divided by 128, rounded up; P = 3 K / 8.
"""

from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.choose import choose
from kernels_pallas.quantize import reference
from kernels_pallas.quantize.reference import MIN_AMAX, TILE, Quantized

__all__ = [
  "MIN_AMAX",
  "TILE",
  "Quantized",
  "SwigluGradients",
  "dequantize_blocks",
  "dequantize_columns",
  "dequantize_rows",
  "pack_e5m6",
  "quantize_blocks",
  "quantize_both",
  "quantize_columns",
  "quantize_rows",
  "quantize_tensor",
  "requantize_columns",
  "swiglu_quantize",
  "swiglu_quantize_backward",
  "unpack_e5m6",
]

_E4M3 = jnp.float8_e4m3fn
_XLA = {"cpu": "reference", "gpu": "reference", "tpu": "reference"}
_GPU = _XLA | {"gpu": "gpu"}
_KERNELS = _GPU | {"tpu": "tpu"}
_PORTABLE = ("reference",)


class SwigluGradients(NamedTuple):
  """What `swiglu_quantize_backward` gives; None for what was not asked for."""

  dh_rows: Quantized  # q_Z2F, s_2fZ: for the gradient of the input
  dh_columns: Quantized  # q_2FZ, s_z2F: for the gradient of the weight
  dgate_Z: jax.Array | None  # FP32
  y_columns: Quantized | None  # q_FZ, s_zF: for the down projection's weight gradient
  dh_Z2F: jax.Array | None  # unquantised


def quantize_rows(
  x_MK: jax.Array,
  *,
  power_of_two: bool = False,
  dtype: jax.typing.DTypeLike = _E4M3,
  rows: jax.Array | int | None = None,
  num_sms: int | None = None,
  impl: str | None = None,
) -> Quantized:
  """Quantises by 1x128 tiles.

  Args:
    x_MK: BF16 or FP32.
    power_of_two: whether scales are powers of two.
    dtype: of the codes, float8_e4m3fn or float8_e5m2.
    rows: int32, may be traced: how many first rows are valid. The others, NaN or not,
      count as zeros: codes 0 and the smallest scale. None: all.
    num_sms: multiprocessors that the GPU's kernel uses, None for all.
    impl: a name from the module's table, or None.

  Returns:
    q_MK, s_kM.

  Raises:
    ValueError: x is no matrix of BF16 or FP32, or impl cannot do this here.
  """
  _check(x_MK, "quantize_rows")
  module = _implementation(_KERNELS, impl, x_MK)
  return module.quantize_rows(
    x_MK, power_of_two, dtype, rows, **_options(module, num_sms)
  )


def quantize_columns(
  x_MK: jax.Array,
  *,
  power_of_two: bool = False,
  dtype: jax.typing.DTypeLike = _E4M3,
  rows: jax.Array | int | None = None,
  num_sms: int | None = None,
  impl: str | None = None,
) -> Quantized:
  """Quantises by 128x1 tiles and transposes: q_KM, s_mK. Else as quantize_rows."""
  _check(x_MK, "quantize_columns")
  module = _implementation(_KERNELS, impl, x_MK, by_columns=True)
  return module.quantize_columns(
    x_MK, power_of_two, dtype, rows, **_options(module, num_sms)
  )


def quantize_both(
  x_MK: jax.Array,
  *,
  power_of_two: bool = False,
  dtype: jax.typing.DTypeLike = _E4M3,
  rows: jax.Array | int | None = None,
  num_sms: int | None = None,
  impl: str | None = None,
) -> tuple[Quantized, Quantized]:
  """quantize_rows and quantize_columns: (q_MK, s_kM), (q_KM, s_mK)."""
  _check(x_MK, "quantize_both")
  module = _implementation(_KERNELS, impl, x_MK, by_columns=True)
  return module.quantize_both(
    x_MK, power_of_two, dtype, rows, **_options(module, num_sms)
  )


def requantize_columns(
  q_MK: jax.Array,
  s_kM: jax.Array,
  *,
  power_of_two: bool = True,
  dtype: jax.typing.DTypeLike = _E4M3,
  rows: jax.Array | int | None = None,
  num_sms: int | None = None,
  impl: str | None = None,
) -> Quantized:
  """128x1 tiles from what quantize_rows wrote: dequantise, transpose, quantise.

  For activations that were saved in FP8 for the weight gradient. With powers of two on
  both sides a code changes only where it falls below the new tile's subnormals.

  Returns:
    q_KM, s_mK.
  """
  module = _implementation(_GPU, impl, q_MK, by_columns=True)
  options = _options(module, num_sms)
  return module.requantize_columns(q_MK, s_kM, power_of_two, dtype, rows, **options)


def quantize_blocks(
  w_KN: jax.Array,
  *,
  power_of_two: bool = False,
  dtype: jax.typing.DTypeLike = _E4M3,
  num_sms: int | None = None,
  impl: str | None = None,
) -> tuple[Quantized, Quantized]:
  """Quantises a weight by 128x128 blocks, in both layouts.

  Args:
    w_KN: BF16 or FP32, [K, N] or [E, K, N].
    power_of_two, dtype, num_sms, impl: as in quantize_rows.

  Returns:
    (q_KN, s_kn), (q_NK, s_nk); the second is the transpose of the first. With a leading
    E where w has it.
  """
  _check(w_KN[0] if w_KN.ndim == 3 else w_KN, "quantize_blocks")
  module = _implementation(_GPU, impl, w_KN, by_columns=True)
  return module.quantize_blocks(w_KN, power_of_two, dtype, **_options(module, num_sms))


def quantize_tensor(
  x: jax.Array,
  *,
  power_of_two: bool = False,
  dtype: jax.typing.DTypeLike = _E4M3,
) -> Quantized:
  """One FP32 scale for a whole array of any shape, for ablations: plain jnp."""
  return reference.quantize_tensor(x, power_of_two, dtype)


def dequantize_rows(
  q_MK: jax.Array, s_kM: jax.Array, *, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
  """x_MK in `dtype` from quantize_rows' codes and scales."""
  return reference.dequantize_rows(q_MK, s_kM).astype(dtype)


def dequantize_columns(
  q_KM: jax.Array, s_mK: jax.Array, *, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
  """x_MK, not its transpose, in `dtype` from quantize_columns' codes and scales."""
  return reference.dequantize_rows(q_KM, s_mK).T.astype(dtype)


def dequantize_blocks(
  q_KN: jax.Array, s_kn: jax.Array, *, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
  """w in `dtype` from either layout of quantize_blocks, [K, N] or [E, K, N]."""
  if q_KN.ndim == 3:
    return jax.vmap(lambda q, s: dequantize_blocks(q, s, dtype=dtype))(q_KN, s_kn)
  return reference.dequantize_blocks(q_KN, s_kn).astype(dtype)


def swiglu_quantize(
  h_Z2F: jax.Array | Quantized,
  gate_Z: jax.Array | None = None,
  *,
  both: bool = False,
  with_h: bool = False,
  power_of_two: bool = False,
  dtype: jax.typing.DTypeLike = _E4M3,
  rows: jax.Array | int | None = None,
  num_sms: int | None = None,
  impl: str | None = None,
) -> Quantized | tuple:
  """Quantises y = silu(a) u gate, where h = [a, u]; FP32 up to the codes.

  Args:
    h_Z2F: BF16 or FP32, or what quantize_rows made of it.
    gate_Z: routing weight of each row, FP32; None stands for ones.
    both: whether to write columns too.
    with_h: whether to write rows of h too, which was read anyway: as quantize_rows with
      `power_of_two`, whatever y's scales are. For activations that are kept in FP8.
    power_of_two, dtype, rows, num_sms, impl: as in quantize_rows.

  Returns:
    y: (q_ZF, s_fZ), or with `both` that and (q_FZ, s_zF). With `with_h` a pair: y, and
    (q_Z2F, s_2fZ) of h.
  """
  _check_swiglu(h_Z2F, gate_Z, None)
  module = _implementation(_GPU, impl, _codes_of(h_Z2F), by_columns=both, halves=True)
  options = _options(module, num_sms)
  return module.swiglu_quantize(
    h_Z2F, gate_Z, both, power_of_two, dtype, rows, with_h, **options
  )


def swiglu_quantize_backward(
  h_Z2F: jax.Array | Quantized,
  gate_Z: jax.Array | None,
  dy_ZF: jax.Array,
  *,
  with_y: bool = False,
  with_dh: jax.typing.DTypeLike | None = None,
  power_of_two: bool = False,
  dtype: jax.typing.DTypeLike = _E4M3,
  rows: jax.Array | int | None = None,
  num_sms: int | None = None,
  impl: str | None = None,
) -> SwigluGradients:
  """The gradient of silu(a) u gate, quantised; FP32 up to the codes.

  Args:
    h_Z2F, gate_Z: as given to swiglu_quantize.
    dy_ZF: gradient of y, BF16 or FP32.
    with_y: whether to compute y again and write its columns.
    with_dh: dtype in which to write dh unquantised too, or None.
    power_of_two, dtype, rows, num_sms, impl: as in quantize_rows; rows that are not
      valid get dgate 0.
  """
  _check_swiglu(h_Z2F, gate_Z, dy_ZF)
  matrices = _codes_of(h_Z2F), dy_ZF
  module = _implementation(_GPU, impl, *matrices, by_columns=True, halves=True)
  gradients = module.swiglu_quantize_backward(
    h_Z2F,
    gate_Z,
    dy_ZF,
    with_y,
    with_dh,
    power_of_two,
    dtype,
    rows,
    **_options(module, num_sms),
  )
  return SwigluGradients(*gradients)


def pack_e5m6(x_MK: jax.Array, *, impl: str | None = None) -> Quantized:
  """Packs a matrix in E5M6: 1 sign, 5 exponent (bias 15) and 6 mantissa bits.

  These are float16's upper 12 bits: exponent 31 stands for NaN, the largest value is
  65024 = 2^15 (1 + 63/64). Tiles are 1x128, scales the power of two at or above
  max(amax, 1e-4) / 65024; rounding is to nearest even. Eight codes fill three words,
  the first code in the highest bits. 1.5 bytes an element and a scale every 128.

  Args:
    x_MK: BF16 or FP32, K a multiple of 8.

  Returns:
    p_MP uint32, s_kM FP32.
  """
  _check(x_MK, "pack_e5m6")
  if x_MK.shape[1] % 8:
    raise ValueError(f"pack_e5m6 needs K a multiple of 8, got {x_MK.shape[1]}")
  choose("pack_e5m6", impl, _XLA, _PORTABLE)
  return reference.pack_e5m6(x_MK)


def unpack_e5m6(
  p_MP: jax.Array, s_kM: jax.Array, *, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
  """x_MK in `dtype` from what pack_e5m6 wrote: plain jnp, which XLA fuses."""
  return reference.unpack_e5m6(p_MP, s_kM).astype(dtype)


def _implementation(
  by_platform: dict[str, str], impl: str | None, *matrices: jax.Array, **needs: bool
) -> ModuleType:
  """The module behind a name, if it takes these; kernels are imported when asked for.

  Raises:
    ValueError: a named implementation that does not take them.
  """
  name = choose("quantize", impl, by_platform, _PORTABLE)
  if name == "gpu":
    from kernels_pallas.quantize import gpu as kernels
  elif name == "tpu":
    from kernels_pallas.quantize import tpu as kernels
  else:
    return reference
  reason = kernels.unsupported(*matrices, **needs)
  if reason is None:
    return kernels
  if impl is None:
    return reference
  raise ValueError(f"quantize: impl={impl!r} {reason}, or pass impl='reference'")


def _options(module: ModuleType, num_sms: int | None) -> dict[str, int]:
  """What only the GPU's kernels take."""
  is_gpu = module.__name__.endswith(".gpu")
  return {"num_sms": num_sms} if is_gpu and num_sms is not None else {}


def _codes_of(h: jax.Array | Quantized) -> jax.Array:
  return h[0] if isinstance(h, tuple) else h


def _check(x: jax.Array, name: str) -> None:
  if x.ndim != 2 or x.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(
      f"{name} needs a matrix of bfloat16 or float32, got {x.dtype}{list(x.shape)}"
    )


def _check_swiglu(h: jax.Array | Quantized, gate, dy) -> None:
  codes = _codes_of(h)
  if codes.ndim != 2 or codes.shape[1] % 2:
    raise ValueError(f"swiglu_quantize needs h [Z, 2F], got {list(codes.shape)}")
  Z, F = codes.shape[0], codes.shape[1] // 2
  if gate is not None and gate.shape != (Z,):
    raise ValueError(f"swiglu_quantize needs {Z} gates, got {list(gate.shape)}")
  if dy is not None and dy.shape != (Z, F):
    raise ValueError(
      f"swiglu_quantize_backward needs dy [{Z}, {F}], got {list(dy.shape)}"
    )
