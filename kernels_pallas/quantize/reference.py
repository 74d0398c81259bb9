"""Quantisation in plain jnp, FP32: the meaning of the operations, and what CPU runs.

Every form is the 1x128 form of another view: columns are the rows of the transpose,
blocks are rows of 128x128 elements. Ragged edges are padded with zeros.

Shapes: M rows, K columns, N columns of a weight, Z dispatched rows, F hidden; a lower
case letter is that dimension divided by 128, rounded up. L is one tile of 128.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.choose import target_platform

TILE = 128
MIN_AMAX = 1e-4
E5M6_MAX = 65024.0  # 2^15 (1 + 63/64)

Quantized = tuple[jax.Array, jax.Array]


def quantize_rows(
  x_MK: jax.Array, power_of_two: bool, dtype: jax.typing.DTypeLike, rows=None
) -> Quantized:
  x_MkL = _tiles(_valid(x_MK, rows))
  s_Mk = scales(amax(x_MkL, -1), float(jnp.finfo(dtype).max), power_of_two)
  q_MkL = codes(x_MkL, s_Mk[..., None], dtype)
  return _joined(q_MkL)[:, : x_MK.shape[1]], s_Mk.T


def quantize_columns(x_MK, power_of_two, dtype, rows=None) -> Quantized:
  return quantize_rows(_valid(x_MK, rows).T, power_of_two, dtype)


def quantize_both(x_MK, power_of_two, dtype, rows=None) -> tuple[Quantized, Quantized]:
  return (
    quantize_rows(x_MK, power_of_two, dtype, rows),
    quantize_columns(x_MK, power_of_two, dtype, rows),
  )


def quantize_blocks(w_KN, power_of_two, dtype) -> tuple[Quantized, Quantized]:
  if w_KN.ndim == 3:  # [E, K, N]
    return jax.vmap(lambda w: quantize_blocks(w, power_of_two, dtype))(w_KN)
  K, N = w_KN.shape
  w_KN = jnp.pad(w_KN.astype(jnp.float32), [(0, -K % TILE), (0, -N % TILE)])
  k, n = w_KN.shape[0] // TILE, w_KN.shape[1] // TILE
  w_kLnL = w_KN.reshape(k, TILE, n, TILE)
  s_kn = scales(amax(w_kLnL, (1, 3)), float(jnp.finfo(dtype).max), power_of_two)
  q_KN = codes(w_kLnL, s_kn[:, None, :, None], dtype).reshape(w_KN.shape)[:K, :N]
  return (q_KN, s_kn), (q_KN.T, s_kn.T)


def quantize_tensor(x: jax.Array, power_of_two, dtype) -> Quantized:
  x = x.astype(jnp.float32)
  s = scales(amax(x, None), float(jnp.finfo(dtype).max), power_of_two)
  return codes(x, s, dtype), s


def dequantize_rows(q_MK: jax.Array, s_kM: jax.Array) -> jax.Array:
  s_MK = jnp.repeat(s_kM.T, TILE, axis=1)[:, : q_MK.shape[1]]
  return q_MK.astype(jnp.float32) * s_MK


def dequantize_blocks(q_KN: jax.Array, s_kn: jax.Array) -> jax.Array:
  K, N = q_KN.shape
  s_KN = jnp.repeat(jnp.repeat(s_kn, TILE, axis=0)[:K], TILE, axis=1)[:, :N]
  return q_KN.astype(jnp.float32) * s_KN


def requantize_columns(q_MK, s_kM, power_of_two, dtype, rows=None) -> Quantized:
  return quantize_columns(dequantize_rows(q_MK, s_kM), power_of_two, dtype, rows)


def swiglu(h_Z2F: jax.Array, gate_Z: jax.Array | None, rows=None) -> jax.Array:
  """silu(a) u gate for h = [a, u], FP32."""
  a_ZF, u_ZF = jnp.split(_valid(h_Z2F, rows), 2, axis=1)
  y_ZF = jax.nn.silu(a_ZF) * u_ZF
  return y_ZF if gate_Z is None else y_ZF * _valid(gate_Z, rows)[:, None]


def swiglu_backward(
  h_Z2F: jax.Array, gate_Z: jax.Array | None, dy_ZF: jax.Array, rows=None
) -> tuple[jax.Array, jax.Array | None]:
  """Gradients of h and gate, FP32: silu'(a) = sigmoid(a) (1 + a (1 - sigmoid(a)))."""
  a_ZF, u_ZF = jnp.split(_valid(h_Z2F, rows), 2, axis=1)
  dy_ZF, sigmoid_ZF = _valid(dy_ZF, rows), jax.nn.sigmoid(a_ZF)
  silu_ZF = a_ZF * sigmoid_ZF
  dgate_Z = None
  if gate_Z is not None:
    dgate_Z = (dy_ZF * silu_ZF * u_ZF).sum(1)
    dy_ZF = dy_ZF * _valid(gate_Z, rows)[:, None]
  da_ZF = dy_ZF * u_ZF * sigmoid_ZF * (1 + a_ZF * (1 - sigmoid_ZF))
  return jnp.concatenate([da_ZF, dy_ZF * silu_ZF], axis=1), dgate_Z


def swiglu_quantize(
  h: jax.Array | Quantized,
  gate_Z,
  both: bool,
  power_of_two,
  dtype,
  rows=None,
  with_h: bool = False,
) -> Quantized | tuple:
  h_Z2F = plain(h)
  y_ZF = swiglu(h_Z2F, gate_Z, rows)
  y = (quantize_both if both else quantize_rows)(y_ZF, power_of_two, dtype)
  return (y, quantize_rows(h_Z2F, True, dtype, rows)) if with_h else y


def swiglu_quantize_backward(
  h: jax.Array | Quantized,
  gate_Z,
  dy_ZF,
  with_y: bool,
  with_dh: jax.typing.DTypeLike | None,
  power_of_two,
  dtype,
  rows=None,
) -> tuple:
  """(rows of dh, columns of dh, dgate, columns of y, dh); None where not asked for."""
  h_Z2F = plain(h)
  dh_Z2F, dgate_Z = swiglu_backward(h_Z2F, gate_Z, dy_ZF, rows)
  y_columns = None
  if with_y:
    y_ZF = swiglu(h_Z2F, gate_Z, rows)
    y_columns = quantize_columns(y_ZF, power_of_two, dtype)
  return (
    *quantize_both(dh_Z2F, power_of_two, dtype),
    dgate_Z,
    y_columns,
    None if with_dh is None else dh_Z2F.astype(with_dh),
  )


def pack_e5m6(x_MK: jax.Array) -> Quantized:
  x_MkL = _tiles(x_MK.astype(jnp.float32))
  s_Mk = scales(amax(x_MkL, -1), E5M6_MAX, power_of_two=True)
  c_MkL = _e5m6_codes(x_MkL / s_Mk[..., None])  # exact: s is a power of two
  c_MK = _joined(c_MkL)[:, : x_MK.shape[1]]
  return _pack_12_bits(c_MK), s_Mk.T


def unpack_e5m6(p_MP: jax.Array, s_kM: jax.Array) -> jax.Array:
  c_MK = _unpack_12_bits(p_MP)
  v_MK = jax.lax.bitcast_convert_type((c_MK << 4).astype(jnp.uint16), jnp.float16)
  return dequantize_rows(v_MK, s_kM)


def plain(h: jax.Array | Quantized) -> jax.Array:
  return dequantize_rows(*h) if isinstance(h, tuple) else h


def _valid(x: jax.Array, rows) -> jax.Array:
  """FP32, with rows past the first `rows` (None: all are valid) set to zero."""
  x = x.astype(jnp.float32)
  if rows is None:
    return x
  valid_M = jnp.arange(x.shape[0]) < rows
  return jnp.where(valid_M.reshape(-1, *[1] * (x.ndim - 1)), x, 0)


def _tiles(x: jax.Array) -> jax.Array:
  """[..., K] -> [..., k, 128], padded with zeros."""
  padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % TILE)]
  x = jnp.pad(x, padding)
  return x.reshape(*x.shape[:-1], x.shape[-1] // TILE, TILE)


def _joined(x: jax.Array) -> jax.Array:
  """[M, k, L] -> [M, k L]."""
  return x.reshape(x.shape[0], x.shape[1] * x.shape[2])


def amax(x: jax.Array, axis) -> jax.Array:
  """The largest magnitude, or NaN. Magnitudes order as their bits do, and NaN comes
  last; XLA's own maximum of floats can lose it on CPU."""
  magnitude = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
  return jax.lax.bitcast_convert_type(magnitude.max(axis), jnp.float32)


def scales(magnitude: jax.Array, limit: float, power_of_two: bool) -> jax.Array:
  """Scales of tiles of this largest magnitude, for a format whose largest is limit."""
  s = divide(jnp.maximum(magnitude, MIN_AMAX), jnp.float32(limit))
  return finish_scales(s, magnitude, power_of_two)


def finish_scales(s: jax.Array, magnitude: jax.Array, power_of_two: bool) -> jax.Array:
  """Rounds up to powers of two, if wanted, and marks tiles with a NaN or infinity."""
  if power_of_two:  # a mantissa that is not 0 carries over into the exponent
    bits = jax.lax.bitcast_convert_type(s, jnp.int32)
    bits = (bits + 0x7FFFFF) & 0x7F800000
    s = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return jnp.where(magnitude < jnp.inf, s, jnp.nan)


def codes(x: jax.Array, s: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """x / s in FP8, rounded whatever follows.

  Without the barrier XLA for GPUs takes a cast to FP8 and back for nothing and leaves
  both out, where codes are widened in the same program.
  """
  largest = float(jnp.finfo(dtype).max)  # JAX casts what lies far above it to NaN
  q = jnp.clip(divide(x, s), -largest, largest).astype(dtype)
  return jax.lax.optimization_barrier(q)


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
  """a / b, rounded once, whatever XLA makes of a division.

  It turns a division by a broadcast value into a product with its reciprocal, but for
  a divisor that depends on each element of a; that is enough on CPU. GPU and TPU divide
  to a few units in the last place, so there the quotient is corrected by its remainder.
  """
  if target_platform() == "cpu":
    return a / jnp.where(jnp.isnan(a), a, b)
  q = a / b
  (q_hi, q_lo), (b_hi, b_lo) = _halves(q), _halves(b)
  # Halves have 12 bits, so their products are exact, fused with the sum or not.
  excess = q_hi * b_hi - a + q_hi * b_lo + q_lo * b_hi + q_lo * b_lo
  return q - excess / b


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x as the sum of its upper 12 bits of mantissa and of the rest."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32) & ~0xFFF
  upper = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return upper, x - upper


def _e5m6_codes(v: jax.Array) -> jax.Array:
  """12-bit codes in uint32, to nearest even: the upper bits of a float16."""
  bits = jax.lax.bitcast_convert_type(v, jnp.uint32)
  sign, magnitude = (bits >> 31) << 11, bits & 0x7FFFFFFF
  dropped = 23 - 6
  rounded = magnitude + ((1 << (dropped - 1)) - 1) + ((magnitude >> dropped) & 1)
  normal = (rounded >> dropped) - ((127 - 15) << 6)
  subnormal = jnp.round(jnp.abs(v) * 2.0**20).astype(jnp.uint32)
  code = jnp.where(jnp.abs(v) < 2.0**-14, subnormal, normal)
  return jnp.where(jnp.isnan(v), jnp.uint32(0x7E0), sign | code)


# Bit i of a row of 12-bit codes, counted from its first code's highest bit, is bit
# i mod 32 of word i div 32, counted from that word's highest bit.
def _pack_12_bits(c_MK: jax.Array) -> jax.Array:
  M, K = c_MK.shape
  c = jnp.moveaxis(c_MK.reshape(M, K // 8, 8), -1, 0)
  words = [
    c[0] << 20 | c[1] << 8 | c[2] >> 4,
    c[2] << 28 | c[3] << 16 | c[4] << 4 | c[5] >> 8,
    c[5] << 24 | c[6] << 12 | c[7],
  ]
  return _joined(jnp.stack(words, axis=-1))


def _unpack_12_bits(p_MP: jax.Array) -> jax.Array:
  M, P = p_MP.shape
  w = jnp.moveaxis(p_MP.reshape(M, P // 3, 3), -1, 0)
  codes = [
    w[0] >> 20,
    w[0] >> 8,
    w[0] << 4 | w[1] >> 28,
    w[1] >> 16,
    w[1] >> 4,
    w[1] << 8 | w[2] >> 24,
    w[2] >> 12,
    w[2],
  ]
  return _joined(jnp.stack(codes, axis=-1) & 0xFFF)
