"""Quantisation on NVIDIA Hopper: what `gpu_tiles` writes for each operation.

Takes BF16, or FP8 codes where there are some already; K is a multiple of 64, M of 8,
or of 64 where columns are written, and SwiGLU's F of 128. XLA does the rest: FP32
inputs, E5M6 and dh unquantised.

Shapes: M rows, K columns, Z dispatched rows, F hidden; a lower-case letter is that
dimension divided by 128, rounded up.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.hopper import traced_once
from kernels_pallas.quantize import gpu_blocks, reference
from kernels_pallas.quantize.gpu_tiles import Matrix, Output, quantize_tiles
from kernels_pallas.quantize.reference import TILE, Quantized

_CODES = (jnp.float8_e4m3fn, jnp.float8_e5m2)
_BOX = (8, 64)  # rows and columns of what TMA copies, by the layout in shared memory
_LOG2_E = 1.4426950408889634


def unsupported(
  *matrices, by_columns: bool = False, halves: bool = False
) -> str | None:
  """Why these kernels cannot quantise these matrices so, or None when they can."""
  for x in matrices:
    if x.dtype not in (jnp.bfloat16, *_CODES):
      return f"takes bfloat16, got {x.dtype}: cast it"
  M, K = matrices[0].shape[-2:]
  if 0 in matrices[0].shape:
    return f"needs some elements, got {list(matrices[0].shape)}"
  if halves and K % (2 * TILE):
    return f"needs F a multiple of {TILE}, got F={K // 2}"
  if K % _BOX[1]:
    return f"needs a number of columns that is a multiple of {_BOX[1]}, got {K}"
  if M % _BOX[by_columns]:
    return f"needs a number of rows that is a multiple of {_BOX[by_columns]}, got {M}"
  return None


def _sigmoid(a):
  """By the special function unit; the reciprocal as that of a root, squared."""
  root = jax.lax.rsqrt(1.0 + jnp.exp2(a * -_LOG2_E))
  return root * root


def _swiglu(tiles, gate):
  a, u = tiles[:2]
  y = a * _sigmoid(a) * u
  return [y if gate is None else y * gate], None


def _swiglu_backward(tiles, gate):
  """Gradients of both halves of h, and the terms of the gate's."""
  (da, du, _), term = _swiglu_backward_and_y(tiles, gate)
  return [da, du], term


def _swiglu_backward_and_y(tiles, gate):
  """These and SwiGLU's output again, from one reading of the tiles."""
  a, u, dy = tiles
  sigmoid = _sigmoid(a)
  silu = a * sigmoid
  y, term = silu * u, dy * silu * u
  if gate is not None:
    y, dy = y * gate, dy * gate
  return [dy * u * (sigmoid + silu * (1.0 - sigmoid)), dy * silu, y], term


def _plain(tiles, gate):
  del gate
  return tiles, None


_PLAIN, _SWIGLU = [Output(_plain)], [Output(_swiglu)]
_INPUT = [Output(_plain, (2,), power_of_two=True)]  # both halves of h
_BACKWARD = [Output(_swiglu_backward, (2,))]
_BACKWARD_AND_Y = [Output(_swiglu_backward_and_y, (2, 1))]


def _quantize(
  x_MK: Matrix, by_rows, by_columns, power_of_two, dtype, rows, num_sms, interpret
):
  q_rows, q_columns, _ = quantize_tiles(
    [x_MK],
    None,
    rows,
    by_rows,
    by_columns,
    columns=x_MK.array.shape[1],
    power_of_two=power_of_two,
    dtype=dtype,
    num_sms=num_sms,
    interpret=interpret,
  )
  return q_rows + q_columns


@traced_once("power_of_two", "dtype", "num_sms", "interpret")
def quantize_rows(
  x_MK, power_of_two, dtype, rows=None, num_sms=None, interpret=None
) -> Quantized:
  options = power_of_two, dtype, rows, num_sms, interpret
  [out] = _quantize(Matrix(x_MK), _PLAIN, [], *options)
  return out


@traced_once("power_of_two", "dtype", "num_sms", "interpret")
def quantize_columns(
  x_MK, power_of_two, dtype, rows=None, num_sms=None, interpret=None
) -> Quantized:
  options = power_of_two, dtype, rows, num_sms, interpret
  [out] = _quantize(Matrix(x_MK), [], _PLAIN, *options)
  return out


@traced_once("power_of_two", "dtype", "num_sms", "interpret")
def quantize_both(
  x_MK, power_of_two, dtype, rows=None, num_sms=None, interpret=None
) -> tuple[Quantized, Quantized]:
  options = power_of_two, dtype, rows, num_sms, interpret
  by_rows, by_columns = _quantize(Matrix(x_MK), _PLAIN, _PLAIN, *options)
  return by_rows, by_columns


@traced_once("power_of_two", "dtype", "num_sms", "interpret")
def quantize_blocks(
  w, power_of_two, dtype, num_sms=None, interpret=None
) -> tuple[Quantized, Quantized]:
  """Of one weight [K, N], or of [E, K, N]."""
  w_EKN = w if w.ndim == 3 else w[None]
  out = gpu_blocks.quantize_blocks(w_EKN, power_of_two, dtype, num_sms, interpret)
  return out if w.ndim == 3 else jax.tree.map(lambda a: a[0], out)


@traced_once("power_of_two", "dtype", "num_sms", "interpret")
def requantize_columns(
  q_MK, s_kM, power_of_two, dtype, rows=None, num_sms=None, interpret=None
) -> Quantized:
  options = power_of_two, dtype, rows, num_sms, interpret
  [out] = _quantize(Matrix(q_MK, s_kM), [], _PLAIN, *options)
  return out


def _halves(h: jax.Array | Quantized) -> tuple[Matrix, Matrix]:
  """The two halves of h's columns."""
  codes, scales = h if isinstance(h, tuple) else (h, None)
  return Matrix(codes, scales), Matrix(codes, scales, codes.shape[1] // 2 // TILE)


@traced_once("both", "power_of_two", "dtype", "with_h", "num_sms", "interpret")
def swiglu_quantize(
  h_Z2F,
  gate_Z,
  both: bool,
  power_of_two,
  dtype,
  rows=None,
  with_h: bool = False,
  num_sms=None,
  interpret=None,
) -> Quantized | tuple:
  a_ZF, u_ZF = _halves(h_Z2F)
  F = a_ZF.array.shape[1] // 2
  q_rows, q_columns, _ = quantize_tiles(
    [a_ZF, u_ZF],
    gate_Z,
    rows,
    _SWIGLU + (_INPUT if with_h else []),
    _SWIGLU if both else [],
    columns=F,
    power_of_two=power_of_two,
    dtype=dtype,
    num_sms=num_sms,
    interpret=interpret,
  )
  y = (q_rows[0], q_columns[0]) if both else q_rows[0]
  return (y, q_rows[1]) if with_h else y


@traced_once("with_y", "with_dh", "power_of_two", "dtype", "num_sms", "interpret")
def swiglu_quantize_backward(
  h_Z2F,
  gate_Z,
  dy_ZF,
  with_y: bool,
  with_dh: jax.typing.DTypeLike | None,
  power_of_two,
  dtype,
  rows=None,
  num_sms=None,
  interpret=None,
) -> tuple:
  F = dy_ZF.shape[1]
  q_rows, q_columns, terms_fZ = quantize_tiles(
    [*_halves(h_Z2F), Matrix(dy_ZF)],
    gate_Z,
    rows,
    _BACKWARD,
    _BACKWARD_AND_Y if with_y else _BACKWARD,
    columns=F,
    sums=gate_Z is not None,
    power_of_two=power_of_two,
    dtype=dtype,
    num_sms=num_sms,
    interpret=interpret,
  )
  dh_Z2F = None
  if with_dh is not None:
    h_Z2F = reference.plain(h_Z2F)
    dh_Z2F = reference.swiglu_backward(h_Z2F, gate_Z, dy_ZF, rows)[0].astype(with_dh)
  return (
    q_rows[0],
    q_columns[0],
    None if terms_fZ is None else terms_fZ.sum(0),
    q_columns[1] if with_y else None,
    dh_Z2F,
  )
