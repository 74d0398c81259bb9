"""Packed 12-bit floats: every code, every rounding, and the packing bit by bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas import quantize as qz

IMPLS = ["reference"]
LARGEST = 65024.0


def decode(code: int) -> float:
  """A code's value, from the definition: sign, exponent of bias 15, 6 mantissa bits."""
  sign = -1.0 if code >> 11 else 1.0
  exponent, mantissa = code >> 6 & 31, code & 63
  if exponent == 31:
    return sign * np.inf if mantissa == 0 else np.nan
  if exponent == 0:
    return sign * mantissa * 2.0**-20
  return sign * (1 + mantissa / 64) * 2.0 ** (exponent - 15)


CODES = np.arange(4096)
VALUES = np.array([decode(c) for c in CODES])


def pack(codes: np.ndarray) -> np.ndarray:
  """Rows of 12-bit codes as words, by way of strings of bits."""
  rows = ["".join(f"{c:012b}" for c in row) for row in codes]
  return np.array(
    [[int(r[i : i + 32], 2) for i in range(0, len(r), 32)] for r in rows], np.uint32
  )


def ones(shape) -> jnp.ndarray:
  return jnp.ones(shape, jnp.float32)


def test_every_code_unpacks_to_its_value():
  got = qz.unpack_e5m6(jnp.asarray(pack(CODES.reshape(4, 1024))), ones((8, 4)))
  np.testing.assert_array_equal(np.asarray(got).ravel(), VALUES)
  # -0 keeps its sign; NaN equals NaN in assert_array_equal.
  assert np.signbit(np.asarray(got).ravel()[2048])


@pytest.mark.parametrize("impl", IMPLS)
def test_every_finite_code_survives_a_round_trip(impl):
  """Each value in a tile whose largest magnitude is the format's, so that s is 1."""
  finite = CODES[np.isfinite(VALUES)]
  codes = np.full((32, 128), 0x7BF)
  codes[:, 1:] = np.resize(finite, (32, 127))
  assert set(finite) <= set(codes.flat)
  words = pack(codes)
  x = VALUES[codes].astype(np.float32)
  p_MP, s_kM = jax.jit(lambda x: qz.pack_e5m6(x, impl=impl))(x)
  np.testing.assert_array_equal(s_kM, np.ones((1, 32)))
  np.testing.assert_array_equal(p_MP, words)
  assert (p_MP.dtype, p_MP.shape) == (jnp.uint32, (32, 48))


@pytest.mark.parametrize("impl", IMPLS)
def test_rounds_to_nearest_even(impl):
  """Midpoints between neighbours, and the FP32 values just beside them."""
  codes = CODES[:0x7BF]  # positive and finite; the last has no neighbour above
  middle = ((VALUES[codes] + VALUES[codes + 1]) / 2).astype(np.float32)
  above, below = np.nextafter(middle, np.float32(1e9)), np.nextafter(middle, 0)
  even = codes + (codes & 1)
  for x, want in [(middle, even), (above, codes + 1), (below, codes)]:
    for sign in (0, 2048):
      padded = np.full((16, 128), LARGEST, np.float32)
      padded[:, 1:].flat[: x.size] = -x if sign else x
      p_MP, s_kM = qz.pack_e5m6(jnp.asarray(padded), impl=impl)
      assert (np.asarray(s_kM) == 1).all()
      expected = np.full((16, 128), 0x7BF)
      expected[:, 1:].flat[: x.size] = want + sign
      np.testing.assert_array_equal(p_MP, pack(expected))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(5, 576), (3, 128), (130, 8)])
def test_scales_and_errors(shape, impl):
  rng = np.random.default_rng(0)
  x = rng.normal(size=shape) * np.exp2(rng.integers(-30, 30, (shape[0], 1)))
  x[0] = 0
  x = x.astype(ml_dtypes.bfloat16)
  p_MP, s_kM = jax.jit(lambda x: qz.pack_e5m6(x, impl=impl))(x)
  y = np.asarray(qz.unpack_e5m6(p_MP, s_kM), np.float64)
  x = x.astype(np.float64)
  assert p_MP.shape == (shape[0], shape[1] * 3 // 8)
  for i, s_M in enumerate(np.asarray(s_kM).T):
    for j, s in enumerate(s_M):
      tile = x[i, j * 128 : (j + 1) * 128]
      want = 2.0 ** np.ceil(np.log2(max(abs(tile).max(), 1e-4) / LARGEST))
      assert s == want
      error = abs(y[i, j * 128 : (j + 1) * 128] - tile)
      assert (error <= np.maximum(abs(tile) * 2.0**-7, s * 2.0**-21)).all()
  assert (y[0] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_poisoned_tile_is_seen_and_alone(impl):
  x = np.ones((2, 256), np.float32)
  x[0, 3], x[1, 200] = np.nan, np.inf
  y = qz.unpack_e5m6(*qz.pack_e5m6(jnp.asarray(x), impl=impl))
  want = np.ones((2, 256))
  want[0, :128] = want[1, 128:] = np.nan
  np.testing.assert_array_equal(y, want)


def test_unpacks_to_a_given_dtype():
  x = jnp.linspace(-3, 3, 256).reshape(2, 128)
  p_MP, s_kM = qz.pack_e5m6(x)
  y = qz.unpack_e5m6(p_MP, s_kM, dtype=jnp.bfloat16)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y.astype(jnp.float32), qz.unpack_e5m6(p_MP, s_kM))
