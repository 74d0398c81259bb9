"""Emulated products by the kernels: the same sums as in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepseek_jax.precision import emulation, hopper
from kernels_pallas import quantize
from kernels_pallas.fp8_matmul.reference import dequantize_tiles

E5M2 = jnp.float8_e5m2
INTERPRET = plgpu.InterpretGPUParams()


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def test_every_code_of_e5m2_is_the_sum_of_two_of_e4m3():
  codes = jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8), E5M2)
  finite = np.isfinite(np.asarray(codes, np.float32))
  codes, scales = codes[None], jnp.full((2, 1), 0.3)
  parts = hopper.in_e4m3((codes, scales))
  assert all(part.dtype == jnp.float8_e4m3fn for part, _ in parts)
  total = np.asarray(sum(dequantize_tiles(*part) for part in parts))[0]
  want = np.asarray(dequantize_tiles(codes, scales))[0]
  np.testing.assert_array_equal(total[finite], want[finite])
  assert not np.isfinite(total[~finite]).any()
  assert len(hopper.in_e4m3((jnp.zeros((1, 128), jnp.float8_e4m3fn), scales))) == 1


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, E5M2])
def test_codes_are_rounded_where_they_are_widened_at_once(dtype):
  """XLA for GPUs leaves out a cast and its reverse; the barrier forbids it."""

  def round_trip(x):
    tiles = quantize.quantize_rows(x, dtype=dtype, impl="reference")
    return quantize.dequantize_rows(*tiles), hopper.in_e4m3(tiles)

  x = normal(0, 128, 256)
  tiles = quantize.quantize_rows(x, dtype=dtype, impl="reference")
  want = quantize.dequantize_rows(*tiles), hopper.in_e4m3(tiles)
  jax.tree.map(np.testing.assert_array_equal, jax.jit(round_trip)(x), want)
  assert "optimization_barrier" in jax.jit(round_trip).lower(x).as_text()


def test_e5m2_rows_by_the_interpreted_kernel():
  rows = quantize.quantize_rows(normal(0, 128, 256), dtype=E5M2)
  _, weight = quantize.quantize_blocks(normal(1, 256, 128))
  got = hopper.multiply(rows, weight, None, True, INTERPRET)
  want = emulation.multiply(rows, weight, None, True)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def cut(x, power):
  unit = 2.0 ** (power - 14)
  return np.trunc(x / unit) * unit


def unpromoted(a, b):
  """a b^T, sums cut to 14 bits after each 128 of the contraction, in float64."""
  a, b = (np.asarray(x, np.float64) for x in (a, b))
  total = np.zeros((len(a), len(b)))
  for k in range(0, a.shape[1], 128):
    part = a[:, k : k + 128] @ b[:, k : k + 128].T
    power = np.frexp(np.maximum(np.abs(part), np.abs(total)))[1]
    total = cut(part, power) + cut(total, power)
  return total


@pytest.mark.parametrize("grouped", [False, True])
def test_sums_without_promotion_by_the_interpreted_kernel(grouped):
  """Within two units of the last of 14 bits, where FP32 rounds the terms; and less."""
  _, x = quantize.quantize_both(normal(0, 512, 128))
  _, dy = quantize.quantize_both(normal(1, 512, 64))
  sizes = jnp.array([512], jnp.int32) if grouped else None
  exact = np.asarray(dequantize_tiles(*x)) @ np.asarray(dequantize_tiles(*dy)).T
  want = unpromoted(dequantize_tiles(*x), dequantize_tiles(*dy))
  got = hopper.weight_gradient(x, dy, sizes, False, INTERPRET)
  got = np.asarray(got[0] if grouped else got)
  unit = 2.0 ** (np.frexp(np.abs(exact).max())[1] - 14)
  assert np.abs(got - want).max() <= 2 * unit
  assert np.abs(got - want).mean() < 0.02 * np.abs(exact - want).mean()
  promoted = hopper.weight_gradient(x, dy, sizes, True, INTERPRET)
  promoted = np.asarray(promoted[0] if grouped else promoted)
  np.testing.assert_allclose(promoted, exact, atol=1e-3)


@pytest.mark.parametrize(
  ("promotion", "dtype"), [(True, jnp.float8_e4m3fn), (False, E5M2)]
)
def test_products_lower_for_cuda(promotion, dtype):
  def products(x, w, dy, sizes):
    columns, (dy_rows, dy_columns) = (
      quantize.quantize_columns(x, impl="reference"),
      quantize.quantize_both(dy, dtype=dtype, impl="reference"),
    )
    (by_input, _) = quantize.quantize_blocks(w, impl="reference")
    dense = by_input[0][0], by_input[1][0]
    return (
      hopper.multiply(dy_rows, by_input, sizes, promotion),
      hopper.weight_gradient(columns, dy_columns, sizes, promotion),
      hopper.multiply(dy_rows, dense, None, promotion),
      hopper.weight_gradient(columns, dy_columns, None, promotion),
    )

  shapes = ((512, 256), (4, 256, 128), (512, 128))
  operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
  sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
  jax.jit(products).trace(*operands, sizes).lower(lowering_platforms=("cuda",))
