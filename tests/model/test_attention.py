"""Attention: absorbed = naive, the cache's size, YaRN's rule, masks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.attention import LatentAttention, make_attention, write_cache
from deepseek_jax.model.rope import frequencies, softmax_scale
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.presets import MOE_16B, R1, V2_LITE, V3
from tests.model.random_models import KINDS, MLA, randomise

# FP64 shows that the forms are the same function; FP32 that they lose nothing but
# rounding: outputs are of the order of one, sums have up to 48 terms of 6e-8 each.
TOLERANCE = {"float32": 5e-6, "float64": 1e-12}
B, T, S = 2, 24, 32


def case(config: ModelConfig, dtype: str):
  """An attention layer and input, in a dtype."""
  blank = jax.eval_shape(lambda: make_attention(config, jax.random.key(0)))
  attention = randomise(blank, 1)
  x_BTD = np.random.default_rng(2).normal(size=(B, T, config.dim))
  attention = jax.tree.map(lambda w: np.asarray(w, dtype), attention)
  return attention, x_BTD.astype(dtype), np.tile(np.arange(T), (B, 1))


@jax.jit
def naive(attention, x_BTD, positions_BT, segments_BT=None):
  return attention(x_BTD, positions_BT, segments_BT)


@jax.jit
def absorbed(attention, x_BTD, cache_BSL, positions_BT):
  """As layer 1 of three; the others' caches stay as they are."""
  cache_YBSL = jnp.stack([cache_BSL + 1, cache_BSL, cache_BSL + 2])
  out, after_YBSL = attention.cached(x_BTD, cache_YBSL, 1, positions_BT)
  kept = (after_YBSL[::2] == cache_YBSL[::2]).all()
  return out, jnp.where(kept, after_YBSL[1], jnp.nan)


# Tokens one at a time, then several at once.
CHUNKS = [1] * 8 + [8] * 2


@pytest.mark.parametrize(
  ("kind", "dtype"),
  [(kind, "float32") for kind in KINDS] + [("mla_yarn", "float64"), ("mha", "float64")],
)
def test_absorbed_is_naive(kind, dtype):
  with jax.enable_x64(dtype == "float64"):
    attention, x, positions = case(KINDS[kind], dtype)
    expected, latents = naive(attention, x, positions)
    assert expected.dtype == dtype
    assert 0.1 < np.abs(expected).mean() < 10  # what the tolerance supposes
    cache = np.zeros((B, S, attention.config.cache_dim), dtype)
    start = 0
    for chunk in CHUNKS:
      now = slice(start, start + chunk)
      out, cache = absorbed(attention, x[:, now], cache, positions[:, now])
      atol = TOLERANCE[dtype]
      np.testing.assert_allclose(out, expected[:, now], rtol=0, atol=atol)
      start += chunk
    np.testing.assert_allclose(cache[:, :T], latents, rtol=0, atol=atol)
    assert start == T
    assert not cache[:, T:].any()


@pytest.mark.parametrize("kind", ["mla", "mha"])
def test_rows_at_their_own_positions(kind):
  """Row 0 continues after 5 tokens and row 1 after 16; what lies beyond is garbage."""
  attention, x, positions = case(KINDS[kind], "float32")
  expected, latents = naive(attention, x, positions)
  before = np.array([[5], [16]])
  cache = np.full((B, S, latents.shape[-1]), 1e3, np.float32)
  for row, n in enumerate(before[:, 0]):
    cache[row, :n] = latents[row, :n]
  places = before + np.arange(8)
  new = np.take_along_axis(x, places[..., None], axis=1)
  out, cache = absorbed(attention, new, cache, places)
  wanted = np.take_along_axis(np.asarray(expected), places[..., None], axis=1)
  np.testing.assert_allclose(out, wanted, rtol=0, atol=TOLERANCE["float32"])
  untouched = np.arange(S) >= before + 8
  assert (np.asarray(cache)[untouched] == 1e3).all()


def test_nothing_is_written_beyond_the_cache():
  cache = jnp.ones((2, 1, 4, 2))
  new = jnp.full((1, 3, 2), 7.0)
  written = write_cache(cache, 1, new, jnp.array([[3, 4, 90]]))
  assert written[:, 0, :, 0].tolist() == [[1, 1, 1, 1], [1, 1, 1, 7]]


def test_cache_is_576_values_a_token_and_layer():
  for config in (V3, R1, V2_LITE):
    model = jax.eval_shape(lambda c=config: Transformer(c, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    _, cache = jax.eval_shape(lambda m, t: m.prefill(t, 16), model, tokens)
    assert cache.shape == (config.n_layers, 2, 16, 576)
    at = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    _, after = jax.eval_shape(lambda m, t, c: m.decode(t, c, t), model, at, cache)
    assert after.shape == cache.shape
    empty = jax.eval_shape(lambda m: m.empty_cache(2, 16), model)
    assert empty == cache
  assert MOE_16B.cache_dim == 2 * 16 * 128  # keys and values of 16 heads


def test_yarn_only_beyond_the_original_length():
  """V3 trains at 4,096 without YaRN; R1 and V3 as released run with it."""
  plain = 10000.0 ** (-np.arange(32) / 32)
  assert not V3.use_yarn
  np.testing.assert_allclose(frequencies(V3), plain, rtol=1e-15)
  assert softmax_scale(V3) == 192**-0.5
  always = dataclasses.replace(V3, yarn="always")
  for config in (R1, always):
    assert config.use_yarn
    # Pairs 0-10 turn more than 32 times in 4,096 tokens, those from 23 on less than
    # once: log(4096 / 2 pi n) / log(10000) * 32 is 10.5 and 22.5.
    freqs = frequencies(config)
    np.testing.assert_allclose(freqs[:11], plain[:11], rtol=1e-15)
    np.testing.assert_allclose(freqs[23:], plain[23:] / 40, rtol=1e-14)
    assert (freqs[11:23] < plain[11:23]).all()
    assert (freqs[11:23] > plain[11:23] / 40).all()
    assert softmax_scale(config) == pytest.approx(0.13523378, abs=5e-9)
  off = dataclasses.replace(always, rope_factor=1.0)
  assert not off.use_yarn
  assert softmax_scale(off) == 192**-0.5


def test_yarn_changes_the_output():
  attention, x, positions = case(MLA, "float32")
  plain, _ = naive(attention, x, positions)
  attention.config = KINDS["mla_yarn"]
  stretched, _ = naive(attention, x, positions)
  assert np.abs(plain - stretched).max() > 0.05


def test_no_gradient_across_documents():
  """Plain attention; tests/model/test_causality.py does it for a model with MLA."""
  attention, x, positions = case(KINDS["mha"], "float32")
  segments = np.array([[0] * 7 + [1] * 9 + [2] * 8, [0] * 20 + [1] * 4])
  mix = np.random.default_rng(3).normal(size=attention.config.dim)

  @jax.jit
  def jacobian(x):
    return jax.jacrev(lambda x: attention(x, positions, segments)[0] @ mix)(x)

  reach_BTS = np.abs(np.einsum("btbsd->btsd", jacobian(x))).max(-1)
  same = segments[:, :, None] == segments[:, None, :]
  allowed = np.tril(np.ones((T, T), bool)) & same
  assert (reach_BTS[~allowed] == 0).all()
  assert (reach_BTS[allowed] > 0).all()


def test_naive_form_fits_under_jit_without_parameters_made():
  """The layer is a pytree: shapes come from `eval_shape`, at any size."""
  layer = jax.eval_shape(lambda: LatentAttention(V3, jax.random.key(0)))
  x = jax.ShapeDtypeStruct((1, 4, V3.dim), jnp.float32)
  at = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  out, latents = jax.eval_shape(lambda a, x, p: a(x, p), layer, x, at)
  assert out.shape == (1, 4, 7168)
  assert latents.shape == (1, 4, 576)
