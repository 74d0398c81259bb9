"""Cross entropy in chunks, and the losses of targets ahead, against plain formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.moe import Execution
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.train import loss
from tests.model.random_models import MLA, randomise


def plain(hidden, head, targets, weights):
  log_probs = jax.nn.log_softmax(hidden @ head)
  return -(jnp.take_along_axis(log_probs, targets[:, None], 1)[:, 0] * weights).sum()


@pytest.mark.parametrize("at_once", [1, 5 * 11, 2**25])
def test_cross_entropy_and_its_gradients(at_once, monkeypatch):
  monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once)
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(13, 7)), jnp.float32)
  head = jnp.asarray(rng.normal(size=(7, 11)), jnp.float32)
  targets = jnp.asarray(rng.integers(0, 11, 13))
  weights = jnp.asarray(rng.integers(0, 2, 13), jnp.float32)
  got = jax.value_and_grad(loss.cross_entropy, (0, 1))(hidden, head, targets, weights)
  expected = jax.value_and_grad(plain, (0, 1))(hidden, head, targets, weights)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, expected)
  only_value = loss.cross_entropy(hidden, head, targets, weights)
  np.testing.assert_allclose(only_value, expected[0], rtol=1e-6)


def test_weights_of_targets_ahead():
  segments = jnp.asarray([[0, 0, 0, 1, 1, 1]])
  shape = (1, 6)
  np.testing.assert_array_equal(loss.loss_weights(None, shape, 1), [[1, 1, 1, 1, 1]])
  np.testing.assert_array_equal(loss.loss_weights(None, shape, 3), [[1, 1, 1, 0, 0]])
  np.testing.assert_array_equal(
    loss.loss_weights(segments, shape, 1), [[1, 1, 0, 1, 1]]
  )
  np.testing.assert_array_equal(
    loss.loss_weights(segments, shape, 2), [[1, 0, 0, 1, 0]]
  )


def test_mtp_losses_equal_the_formula():
  """L_k sums over targets that exist; depths are averaged (report, equation 24-25)."""
  config = dataclasses.replace(MLA, n_mtp_layers=2)
  model = randomise(Transformer(config, jax.random.key(0)), 0)
  tokens = np.random.default_rng(0).integers(0, 64, (2, 10)).astype(np.int32)

  @jax.jit
  def run(model, tokens):
    """The parts, and the log probabilities of the main model and of each depth."""
    parts = loss.loss_parts(model, tokens, None, Execution())
    hidden = model(tokens[:, :-1]).hidden_BTD
    ahead, _ = model.look_ahead(hidden, tokens[:, 1:])
    states = [model.norm(hidden), *ahead]
    return parts, [jax.nn.log_softmax(model.head(state)) for state in states]

  parts, log_probs = run(model, tokens)
  main_log_probs, *depths = (np.asarray(x, np.float64) for x in log_probs)
  total = 0.0
  for depth, log_probs in enumerate(depths, start=1):
    for b in range(2):
      for i in range(9 - depth):  # the target is token i + depth + 1 of 0..9
        total -= log_probs[b, i, tokens[b, i + depth + 1]]
  np.testing.assert_allclose(parts.mtp, total / 2, rtol=1e-5)
  main = -sum(
    main_log_probs[b, i, tokens[b, i + 1]] for b in range(2) for i in range(9)
  )
  np.testing.assert_allclose(parts.main, main, rtol=1e-5)
