"""Tile quantisation in NumPy and ml_dtypes, one tile at a time: the tests' oracle."""

import ml_dtypes
import numpy as np

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def tile_scale(tile, largest=448.0, power_of_two=False) -> np.float32:
  """The scale of one tile: of its valid elements, however many."""
  amax = np.abs(tile.astype(np.float32)).max(initial=0)
  if not np.isfinite(amax):
    return np.float32(np.nan)
  s = np.maximum(amax, np.float32(1e-4)) / np.float32(largest)
  if power_of_two:
    mantissa, exponent = np.frexp(s)  # s = mantissa * 2^exponent, 0.5 <= mantissa < 1
    s = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
  return np.float32(s)


def tile_codes(tile, s, dtype=E4M3) -> np.ndarray:
  largest = np.float32(ml_dtypes.finfo(dtype).max)
  with np.errstate(invalid="ignore"):
    return np.clip(tile.astype(np.float32) / s, -largest, largest).astype(dtype)


def quantize(x, tile_shape, power_of_two=False, dtype=E4M3):
  """Codes of x, and scales [tiles down, tiles across], for any shape of tile."""
  down, across = tile_shape
  largest = float(ml_dtypes.finfo(dtype).max)
  codes = np.zeros(x.shape, dtype)
  scales = np.zeros((-(-x.shape[0] // down), -(-x.shape[1] // across)), np.float32)
  for i, j in np.ndindex(scales.shape):
    at = slice(i * down, (i + 1) * down), slice(j * across, (j + 1) * across)
    scales[i, j] = tile_scale(x[at], largest, power_of_two)
    codes[at] = tile_codes(x[at], scales[i, j], dtype)
  return codes, scales


def rows(x, **options):
  q_MK, s_Mk = quantize(x, (1, 128), **options)
  return q_MK, s_Mk.T


def columns(x, **options):
  q_MK, s_mK = quantize(x, (128, 1), **options)
  return q_MK.T, s_mK


def blocks(w, **options):
  q_KN, s_kn = quantize(w, (128, 128), **options)
  return (q_KN, s_kn), (q_KN.T, s_kn.T)


def bits(a) -> np.ndarray:
  """Bytes or words of an array, with every NaN alike, so that arrays compare by bit."""
  a = np.asarray(a)
  words = a.view(np.uint8 if a.itemsize == 1 else np.uint32).copy()
  words[np.isnan(a.astype(np.float32))] = np.iinfo(words.dtype).max
  return words


def assert_same(got, want) -> None:
  """Codes and scales, or nested tuples of them, agree in shape, dtype and every bit."""
  if isinstance(want, tuple):
    assert len(got) == len(want)
    for g, w in zip(got, want):
      assert_same(g, w)
    return
  got = np.asarray(got)
  assert (got.shape, got.dtype) == (want.shape, want.dtype)
  np.testing.assert_array_equal(bits(got), bits(want))
