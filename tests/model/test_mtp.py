"""Multi-token prediction against a computation written out position by position."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.moe import Execution
from deepseek_jax.model.transformer import Transformer
from tests.model.random_models import MLA, random_model

DEPTHS, T = 2, 6


def norm(x, weight):
  """RMSNorm of one vector, in NumPy."""
  return x / np.sqrt(np.mean(x * x) + 1e-6) * np.asarray(weight[...])


@jax.jit
def run_block(block, x_BTD):
  return block(x_BTD, jnp.arange(x_BTD.shape[1])[None], None, Execution())[0]


def by_hand(model, hidden_TD, tokens):
  """Normed states of each depth, at the positions where its tokens are known.

  `tokens` are all T + 1; position t of depth k joins the state of depth k - 1 at t
  with the embedding of token t + k.
  """
  config = model.config
  table = np.asarray(model.embed.weight[...])
  previous, last_norm = hidden_TD, model.norm
  depths = []
  for k, module in enumerate(model.mtp, 1):
    joined = np.zeros((T, config.dim), np.float32)  # what is unknown stays zero
    for t in range(T + 1 - k):
      state = previous[t]
      if config.mtp_hidden == "post_norm":
        state = norm(state, last_norm.weight)
      embedding = norm(table[tokens[t + k]], module.enorm.weight)
      state = norm(state, module.hnorm.weight)
      if config.mtp_concat == "embedding_first":
        pair = np.concatenate([embedding, state])
      else:
        pair = np.concatenate([state, embedding])
      joined[t] = pair @ np.asarray(module.eh_proj[...])
    previous = np.asarray(run_block(module.block, joined[None])[0])
    states = [norm(state, module.norm.weight) for state in previous[: T + 1 - k]]
    depths.append(np.stack(states))
    last_norm = module.norm
  return depths


@pytest.mark.parametrize(
  ("hidden", "concat"),
  [("post_norm", "embedding_first"), ("pre_norm", "hidden_first")],
)
def test_two_depths(hidden, concat):
  config = dataclasses.replace(
    MLA, n_mtp_layers=DEPTHS, mtp_hidden=hidden, mtp_concat=concat
  )
  model = random_model(config)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, config.vocab_size, (2, T + 1))
  hidden_BTD = rng.normal(size=(2, T, config.dim)).astype(np.float32)
  states, stats = jax.jit(Transformer.look_ahead)(model, hidden_BTD, tokens[:, 1:])
  assert [s.shape for s in states] == [(2, T, config.dim)] * DEPTHS
  assert stats.counts_E.shape == (DEPTHS, config.n_routed_experts)
  assert stats.entropy.shape == (DEPTHS,)
  routed = 2 * T * config.n_activated_experts
  assert stats.counts_E.sum(-1).tolist() == [routed] * DEPTHS
  for row in range(2):
    for found, wanted in zip(states, by_hand(model, hidden_BTD[row], tokens[row])):
      np.testing.assert_allclose(found[row, : len(wanted)], wanted, rtol=0, atol=1e-5)


def test_no_depth():
  model = random_model(MLA)
  tokens = np.zeros((1, T), np.int32)
  states, stats = model.look_ahead(jnp.zeros((1, T, MLA.dim)), tokens)
  assert states == []
  assert stats is None
