"""What each position may see: the past, its own document, and MTP's few tokens ahead.

Every position holds another token, so the gradient of an output with respect to a row
of the embedding table is its gradient with respect to one position's input.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.layers import map_variables
from deepseek_jax.model.transformer import Transformer
from tests.model.random_models import MHA, YARN, random_model

T, DEPTHS = 9, 2
CONFIG = dataclasses.replace(YARN, n_mtp_layers=DEPTHS)
ONE_DOCUMENT, TWO_DOCUMENTS = np.zeros(T + 1, int), (np.arange(T + 1) >= 4).astype(int)


@jax.jit
def states(model, tokens, segments):
  """Of the main model and of each MTP depth, each ready for the head: [k, B, T, D]."""
  segments = segments[:, :-1]
  hidden = model(tokens[:, :-1], segments).hidden_BTD
  ahead, _ = model.look_ahead(hidden, tokens[:, 1:], segments)
  return jnp.stack([model.norm(hidden), *ahead])


@functools.cache
def reach_jacobian():
  """(segments) -> largest |d state_t / d embedding_s|, [depth, t, s]."""
  model, tokens = random_model(CONFIG), np.arange(T + 1) + 3
  mix = np.random.default_rng(5).normal(size=CONFIG.dim)

  def mixed(table, segments):
    same = map_variables(
      lambda v: v.replace(table) if v is model.embed.weight else v, model
    )
    return states(same, tokens[None], segments[None])[:, 0] @ mix

  jacobian = jax.jit(jax.jacrev(mixed))

  def reach(segments):
    found = jacobian(model.embed.weight[...], segments)[:, :, tokens]
    return np.abs(found).max(-1)

  return reach


@pytest.mark.parametrize("segments", [ONE_DOCUMENT, TWO_DOCUMENTS], ids=["one", "two"])
def test_reach_by_gradient(segments):
  """Depth k sees k tokens beyond its position, and back to its document's start.

  A document's last positions predict, and in MTP read, tokens of the next one; the
  loss leaves them out.
  """
  found = reach_jacobian()(segments)
  starts = np.searchsorted(segments, segments[:-1])[:, None]
  s, t = np.arange(T + 1), np.arange(T)[:, None]
  for depth in range(1 + DEPTHS):
    allowed = (s >= starts) & (s <= t + depth)
    known = slice(0, T + 1 - max(depth, 1))  # positions whose tokens exist
    one, allowed = found[depth][known], allowed[known]
    assert (one[~allowed] == 0).all(), one
    assert (one[allowed] > 1e-6).all(), one


@pytest.mark.parametrize("config", [YARN, MHA], ids=["mla", "mha"])
def test_later_tokens_change_nothing(config):
  """What a gradient cannot see: other tokens' choices of experts."""
  model = random_model(config)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, config.vocab_size, (1, 32))
  later = rng.integers(0, config.vocab_size, (1, 32))
  other = np.where(np.arange(32) < 20, tokens, later)
  logits = jax.jit(Transformer.logits)
  a, b = logits(model, tokens)[0], logits(model, other)[0]
  np.testing.assert_allclose(a[:20], b[:20], rtol=0, atol=1e-5)
  assert np.abs(a[20:] - b[20:]).max() > 0.1


def test_a_document_is_read_as_if_it_stood_alone():
  """With segments, at any place in the sequence, since positions are relative."""
  model = random_model(CONFIG)
  tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (1, T + 1))
  apart, joined = TWO_DOCUMENTS[None], ONE_DOCUMENT[None]
  n = T - 4  # positions of the second document
  whole = states(model, tokens, apart)[:, :, 4:]
  first = np.roll(tokens, -4, axis=1)  # the second document at the start
  alone = states(model, first, joined)[:, :, :n]
  for depth in range(1 + DEPTHS):
    known = slice(0, n + 1 - max(depth, 1))
    # Rotations by larger angles round differently in FP32.
    np.testing.assert_allclose(
      whole[depth, :, known], alone[depth, :, known], rtol=0, atol=1e-5
    )
  unmasked = states(model, tokens, joined)[:, :, 4:]
  assert np.abs(unmasked - alone).max() > 0.1  # the mask does something
