"""Quantiser, exact products and bounds in NumPy, for the tests of FP8 products."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

BLOCK = 128


def blocks(size):
  return -(-size // BLOCK)


def quantize_tiles(x_MK):
  """Codes and scales of 1 x 128 tiles: [M, K] e4m3 and [k, M] FP32."""
  m, k = x_MK.shape
  padded = np.zeros((m, blocks(k) * BLOCK), np.float32)
  padded[:, :k] = x_MK
  tiles = padded.reshape(m, -1, BLOCK)
  scales = np.maximum(np.nanmax(abs(tiles), axis=2), 1e-4).astype(np.float32) / 448
  codes = (tiles / scales[:, :, None]).astype(ml_dtypes.float8_e4m3fn)
  return jnp.asarray(codes.reshape(m, -1)[:, :k]), jnp.asarray(scales.T)


def quantize_blocks(x_NK):
  """Codes and scales of 128 x 128 blocks: [N, K] e4m3 and [n, k] FP32."""
  n, k = x_NK.shape
  padded = np.zeros((blocks(n) * BLOCK, blocks(k) * BLOCK), np.float32)
  padded[:n, :k] = x_NK
  tiles = padded.reshape(blocks(n), BLOCK, blocks(k), BLOCK)
  scales = np.maximum(abs(tiles).max(axis=(1, 3)), 1e-4).astype(np.float32) / 448
  codes = (tiles / scales[:, None, :, None]).astype(ml_dtypes.float8_e4m3fn)
  codes = codes.reshape(padded.shape)[:n, :k]
  return jnp.asarray(codes), jnp.asarray(scales)


def dequantize_tiles(codes_MK, scales_kM):
  codes = np.asarray(codes_MK).astype(np.float64)
  scales = np.repeat(np.asarray(scales_kM, np.float64).T, BLOCK, axis=1)
  return codes * scales[:, : codes.shape[1]]


def dequantize_blocks(codes_NK, scales_nk):
  codes = np.asarray(codes_NK).astype(np.float64)
  scales = np.asarray(scales_nk, np.float64).repeat(BLOCK, 0).repeat(BLOCK, 1)
  return codes * scales[: codes.shape[0], : codes.shape[1]]


def calc_diff(x, y):
  """DeepGEMM's: 1 - 2 <x, y> / (<x, x> + <y, y>), in float64."""
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  total = (x * x).sum() + (y * y).sum()
  return 1 - 2 * (x * y).sum() / total if total else 0.0


def assert_close(got, want, magnitude, dtype, impl):
  """calc_diff, and a bound per element, which calc_diff lets whole wrong rows pass.

  Hopper's tensor cores keep about 14 bits within 128 terms: their error is well below
  2^-9 of the sum of magnitudes (it would be 2^-24 a term in FP32). Other
  implementations: 2^-17, which FP32 sums of up to 2^7 terms in a row keep to. Rounding
  to the output's type adds half a unit in the last place.
  """
  relative = 2.0**-9 if impl == "gpu" else 2.0**-17
  assert got.dtype == dtype
  got = np.asarray(got, np.float64)
  assert np.isfinite(got).all()
  bound = relative * magnitude + float(jnp.finfo(dtype).eps) / 2 * abs(want)
  assert (abs(got - want) <= bound * 1.01).all()
  assert calc_diff(got, want) < (1e-6 if dtype == jnp.float32 else 1e-5)
