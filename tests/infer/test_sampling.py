"""Choices of the next token: exact sets, exact distributions, independent rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.infer.sampling import next_tokens, nucleus, row_keys

# Powers of two, so that their sums are exact and p can stand on an edge.
PROBS = np.array([0.125, 0.5, 0.03125, 0.25, 0.0625, 0.03125], np.float32)
ROWS = 20_000
keys_of = jax.jit(row_keys)


@functools.partial(jax.jit, static_argnames="rows")
def draw(logits_V, rows, temperature, top_p):
  keys = row_keys(jax.random.key(7), jnp.arange(rows), jnp.full(rows, 3))
  return next_tokens(jnp.tile(logits_V, (rows, 1)), keys, temperature, top_p)


def assert_distribution(tokens, probs) -> None:
  """Chi-square against exact probabilities, at a level of about 1e-6."""
  counts = np.bincount(tokens, minlength=len(probs))
  assert (counts[probs == 0] == 0).all()
  expected, counts = probs[probs > 0] * len(tokens), counts[probs > 0]
  chi_square = ((counts - expected) ** 2 / expected).sum()
  freedom = len(expected) - 1
  # Wilson and Hilferty: (chi2 / k)^(1/3) is normal(1 - 2/9k, 2/9k).
  z = ((chi_square / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (
    2 / (9 * freedom)
  ) ** 0.5
  assert z < 4.75, (chi_square, counts, expected)


@pytest.mark.parametrize(
  ("top_p", "kept"),
  [
    (1e-6, {1}),
    (0.5, {1}),  # reached exactly: no more
    (0.500001, {1, 3}),  # the token that crosses is included
    (0.75, {1, 3}),
    (0.875, {0, 1, 3}),
    (0.9, {0, 1, 3, 4}),
    (0.95, {0, 1, 2, 3, 4}),  # of the equal 2 and 5 the lower
    (1.0, {0, 1, 2, 3, 4, 5}),
  ],
)
def test_nucleus_is_the_smallest_set_that_reaches_p(top_p, kept):
  found = jax.jit(nucleus)(PROBS[None], top_p)[0]
  assert set(np.flatnonzero(found)) == kept


def test_impossible_tokens_are_never_kept():
  found = jax.jit(nucleus)(np.array([[0.0, 0.5, 0.0, 0.5]], np.float32), 1.0)
  assert found[0].tolist() == [False, True, False, True]


def test_greedy_takes_the_first_maximum():
  logits = np.array([[1.0, 3.0, 3.0], [0.0, -1.0, -2.0]], np.float32)
  assert next_tokens(logits, None).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature):
  expected = PROBS ** (1 / temperature)
  tokens = draw(np.log(PROBS) + 5, ROWS, temperature, None)
  assert_distribution(tokens, expected / expected.sum())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_p_after_temperature(temperature):
  heated = PROBS ** (1 / temperature)
  heated /= heated.sum()
  order = np.argsort(-heated, kind="stable")
  n = 1 + np.searchsorted(np.cumsum(heated[order]), 0.8)  # 0.8 is on no edge
  expected = np.zeros_like(heated)
  expected[order[:n]] = heated[order[:n]]
  tokens = draw(np.log(PROBS) - 3, ROWS, temperature, 0.8)
  assert_distribution(tokens, expected / expected.sum())


def test_tiny_temperature_is_greedy():
  logits = np.array([-40.0, 30.0, 29.9, 10.0], np.float32)
  assert set(np.asarray(draw(logits, 64, 1e-30, None))) == {1}
  assert set(np.asarray(draw(logits, 64, 1e-30, 0.9))) == {1}


def test_a_row_does_not_know_its_neighbours():
  logits = np.random.default_rng(0).normal(size=(8, 50)).astype(np.float32)
  key, rows, positions = jax.random.key(1), np.arange(8), np.arange(8) + 11
  choose = jax.jit(next_tokens)
  together = choose(logits, keys_of(key, rows, positions), 1.0, 0.9)
  some = np.array([6, 2])
  apart = choose(logits[some], keys_of(key, rows[some], positions[some]), 1.0, 0.9)
  assert together[some].tolist() == apart.tolist()


def test_keys_differ_by_row_and_by_position():
  rows, positions = (x.ravel() for x in np.mgrid[:16, :16])
  data = jax.random.key_data(keys_of(jax.random.key(0), rows, positions))
  assert len({tuple(k) for k in np.asarray(data).tolist()}) == 256
