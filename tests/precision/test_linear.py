"""FP8 Linears: exactly the products of what was rounded, close to the unrounded ones.

Inputs in FP32, so that outputs are not rounded again and bounds can be tight.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.fp8_config import Fp8Config
from deepseek_jax.precision.linear import linear
from deepseek_jax.precision.tiles import Fp8Weight, Recipe, quantize_weight
from kernels_pallas import quantize

KEY = jax.random.key(0)
EMULATED = Recipe(emulated=True)


def calc_diff(x, y) -> float:
  """DeepGEMM's measure: 1 - 2<x, y> / (<x, x> + <y, y>)."""
  x, y = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
  return 1 - 2 * (x @ y) / (x @ x + y @ y)


def outputs(x, w: Fp8Weight, dy, contract=1, saved=None):
  """y, and the gradients of x and w for the output gradient dy."""

  def run(x, gradient):
    return linear(x, dataclasses.replace(w, gradient=gradient), contract, saved)

  y, pull = jax.vjp(run, x, w.gradient)
  return y, *pull(dy)


def make(m=200, k=320, n=192, dtype=jnp.float32):
  keys = jax.random.split(KEY, 3)
  shapes = (m, k), (k, n), (m, n)
  return [jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes)]


def test_products_of_what_was_rounded():
  x, w, dy = make()
  y, dx, dw = outputs(x, quantize_weight(w, 1, 1, EMULATED), dy)
  (by_input, _) = quantize.quantize_blocks(w)
  w8 = quantize.dequantize_blocks(*by_input)
  rows, columns = quantize.quantize_both(dy)
  x_rows = quantize.dequantize_rows(*quantize.quantize_rows(x))
  x_columns = quantize.dequantize_columns(*quantize.quantize_columns(x))
  dy_rows = quantize.dequantize_rows(*rows)
  dy_columns = quantize.dequantize_columns(*columns)
  with jax.default_matmul_precision("highest"):
    expected = x_rows @ w8, dy_rows @ w8.T, x_columns.T @ dy_columns
  for got, want in zip((y, dx, dw), expected):
    # FP32 sums of at most 320 products in another order.
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_close_to_bf16_and_within_a_bound_per_element():
  x, w, dy = make(256, 512, 384, jnp.bfloat16)
  got = outputs(x, quantize_weight(w, 1, 1, EMULATED), dy)
  wide = [a.astype(jnp.float32) for a in (x, w, dy)]
  want = wide[0] @ wide[1], wide[2] @ wide[1].T, wide[0].T @ wide[2]
  for g, exact, terms in zip(got, want, (512, 384, 256)):
    assert 1e-5 < calc_diff(g, exact) < 1e-3
    # Each factor is off by at most 2^-4 of itself; 6 standard deviations of the sum.
    assert np.abs(g - exact).max() < 6 * 2**-4 * np.sqrt(2 * terms)


def test_weight_gradient_is_fp32_from_bf16_activations():
  x, w, dy = make(dtype=jnp.bfloat16)
  y, dx, dw = outputs(x, quantize_weight(w, 1, 1, EMULATED), dy)
  assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  assert np.any(dw != dw.astype(jnp.bfloat16))


def test_several_input_and_output_dimensions():
  x, w, dy = make(12, 64, 48)
  flat = outputs(x, quantize_weight(w, 1, 1, EMULATED), dy)
  w8 = quantize_weight(w.reshape(4, 16, 6, 8), 2, 2, EMULATED)
  y, dx, dw = outputs(x.reshape(3, 4, 4, 16), w8, dy.reshape(3, 4, 6, 8), contract=2)
  assert y.shape == (3, 4, 6, 8)
  for got, want in zip((y, dx, dw), flat):
    np.testing.assert_array_equal(got.reshape(want.shape), want)


def test_stacked_weights_are_quantised_one_by_one():
  w = jax.random.normal(KEY, (2, 3, 160, 4, 40))
  stacked = quantize_weight(w, 1, 2, EMULATED)
  one = quantize_weight(w[1, 2], 1, 2, EMULATED)
  jax.tree.map(
    lambda s, o: np.testing.assert_array_equal(s[1, 2], o, strict=True), stacked, one
  )


def test_saved_input_is_kept_in_twelve_bits(capsys):
  x, w, dy = make(128, 256, 64, jnp.bfloat16)
  w8 = quantize_weight(w, 1, 1, EMULATED)

  def run(x):
    y = linear(jnp.tanh(x), w8, saved="kept")
    return (y.astype(jnp.float32) * dy).sum()

  policy = jax.checkpoint_policies.save_only_these_names("kept")
  jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(run, policy=policy), x)
  printed = capsys.readouterr().out
  kept = [
    line for line in printed.splitlines() if "kept" in line or "output of" in line
  ]
  assert any("uint32[128,96]" in line or "u32[128,96]" in line for line in kept), (
    printed
  )
  assert not any("bf16[128,256]" in line for line in kept), printed


def test_gradient_uses_the_input_as_it_was_kept():
  x, w, dy = make()
  w8 = quantize_weight(w, 1, 1, EMULATED)
  _, _, dw = outputs(x, w8, dy, saved="kept")
  short = quantize.unpack_e5m6(*quantize.pack_e5m6(x), dtype=x.dtype)
  columns = quantize.quantize_columns(short, power_of_two=True)
  _, dy_columns = quantize.quantize_both(dy)
  with jax.default_matmul_precision("highest"):
    want = quantize.dequantize_columns(*columns).T @ quantize.dequantize_columns(
      *dy_columns
    )
  np.testing.assert_allclose(dw, want, rtol=0, atol=2e-6 * np.abs(want).max())
  bf16 = Recipe(Fp8Config(attention_output="bf16"), emulated=True)
  exact = outputs(x, quantize_weight(w, 1, 1, bf16), dy, saved="kept")[2]
  unsaved = outputs(x, w8, dy)[2]
  np.testing.assert_array_equal(exact, unsaved)
  assert np.any(dw != exact)


def errors(config: Fp8Config, x, w, dy) -> list[float]:
  """calc_diff of y, dx and dw from the unrounded ones."""
  got = outputs(x, quantize_weight(w, 1, 1, Recipe(config, emulated=True)), dy)
  with jax.default_matmul_precision("highest"):
    want = x @ w, dy @ w.T, x.T @ dy
  return [calc_diff(g, e) for g, e in zip(got, want)]


def test_ablations_are_worse_where_the_paper_says():
  x, w, dy = make(256, 256, 256)
  spiked = x.at[3, 5].set(1e6)  # shares its scale with a tile, or with all
  tile, tensor = Fp8Config(), Fp8Config(scales="tensor")
  rest = np.r_[0:3, 4:256]
  y = [
    outputs(spiked, quantize_weight(w, 1, 1, Recipe(c, emulated=True)), dy)[0][rest]
    for c in (tile, tensor)
  ]
  exact = (x @ w)[rest]
  assert calc_diff(y[0], exact) < 1e-3 < 1e-2 < calc_diff(y[1], exact)

  # One token's gradient much larger: its block pushes its neighbours below 2^-9.
  dy = dy.at[7].multiply(1e6)
  dx = [
    outputs(x, quantize_weight(w, 1, 1, Recipe(c, emulated=True)), dy)[1]
    for c in (tile, Fp8Config(gradient_tiles="128x128"))
  ]
  exact, others = dy @ w.T, np.r_[0:7, 8:128]
  assert calc_diff(dx[0][others], exact[others]) < 1e-3
  assert calc_diff(dx[1][others], exact[others]) > 1e-2


def test_e5m2_gradients_have_a_coarser_grid():
  x, w, dy = make()
  e4m3, e5m2 = (
    errors(Fp8Config(gradient_format=f), x, w, dy) for f in ("e4m3", "e5m2")
  )
  assert e4m3[0] == e5m2[0]
  assert e5m2[1] > 1.8 * e4m3[1]
  assert e5m2[2] > 1.8 * e4m3[2]


def test_fourteen_bit_sums_are_worse_and_grow_with_the_contraction():
  keys = jax.random.split(KEY, 2)
  x = jnp.abs(jax.random.normal(keys[0], (16, 4096)))
  w = jnp.abs(jax.random.normal(keys[1], (4096, 16)))
  promoted, plain = (
    linear(x, quantize_weight(w, 1, 1, Recipe(Fp8Config(promotion=p), emulated=True)))
    for p in (True, False)
  )
  error = np.abs(np.asarray(plain / promoted) - 1).max()
  assert 1e-3 < error < 0.1  # the report: nearly 2% at K = 4096


@pytest.mark.parametrize("name", ["scales", "gradient_tiles", "gradient_format"])
def test_unknown_choice_is_one_clear_line(name):
  with pytest.raises(ValueError, match=rf"fp8\.{name}='x' must be one of"):
    Fp8Config(**{name: "x"})


def test_parts_of_an_fp8_weight_are_refused():
  w = quantize_weight(jnp.ones((8, 8)), 1, 1, EMULATED)
  assert w[...] is w
  with pytest.raises(TypeError, match="no parts"):
    w[0]
