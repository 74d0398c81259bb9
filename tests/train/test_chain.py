"""Steps dispatched ahead give what a loop that waits for each step gives.

With a toy step: the state is one number, a batch says how much room it needs and
whether it is finite.
"""

import functools
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.mesh import make_mesh
from deepseek_jax.train import chain as chain_module
from deepseek_jax.train.chain import Chain, Step
from deepseek_jax.train.schedule import Values

CAPACITIES = (1.0, 2.0, 4.0, float("inf"))


@functools.cache
def _compile(capacity):
  def step(state, batch, scalars):
    overflow = (batch["need"] > capacity) | scalars.blocked
    finite = jnp.isfinite(batch["value"])
    applied = finite & ~overflow
    new = jnp.where(
      applied, 0.9 * state + batch["value"] * scalars.learning_rate, state
    )
    metrics = {
      "overflow": overflow,
      "finite": finite,
      "applied": applied,
      "counts": jnp.ones((1, 4), jnp.int32),
    }
    return new, metrics

  return jax.jit(step, donate_argnums=0)


def _steps(seed: int, n: int) -> list[tuple[float, float]]:
  rng = random.Random(seed)
  needs = rng.choices((0.5, 1.5, 3.0, 9.0), (8, 2, 1, 1), k=n)
  values = rng.choices((1.0, 2.0, float("nan")), (4, 4, 1), k=n)
  return list(zip(needs, values))


def _run(steps, drain, capacity=0, raised_at=0, state=0.0, first=1):
  """(number, state after, capacity, applied) of each step; drain(k) settles all."""
  mesh = make_mesh(devices=jax.devices()[:1])
  chain = Chain(
    jnp.float32(state),
    mesh,
    CAPACITIES,
    _compile,
    lambda state, number: jnp.copy(state),
    capacity,
    raised_at,
  )
  out = []
  for number, (need, value) in enumerate(steps, first):
    batch = {"need": jnp.float32(need), "value": jnp.float32(value)}
    chain.push(Step(number, batch, Values(0.1 * number, 0.0, 0.0, 8), 8, 8 * number))
    for done in chain.settle(0 if drain(number) else 1):
      out.append(_seen(done))
  out += [_seen(done) for done in chain.settle(0)]
  return out, chain


def _seen(step: Step):
  applied = bool(step.metrics["applied"])
  return step.number, float(step.weights), step.capacity, applied


@pytest.mark.parametrize("seed", range(6))
def test_one_ahead_is_the_same_as_waiting(seed, monkeypatch):
  monkeypatch.setattr(chain_module, "STEPS_BEFORE_LOWER", 5)
  steps = _steps(seed, 40)
  waiting, last = _run(steps, lambda _: True)
  assert len({capacity for _, _, capacity, _ in waiting}) > 1, "no overflow happened"
  assert [number for number, *_ in waiting] == list(range(1, 41))
  rng = random.Random(seed)
  for drain in (lambda _: False, lambda k: k % 7 == 0, lambda _: rng.random() < 0.3):
    ahead, chain = _run(steps, drain)
    assert ahead == waiting
    assert (chain.capacity, chain.raised_at) == (last.capacity, last.raised_at)
    assert float(chain.state) == float(last.state)


def test_stopping_anywhere_and_going_on_is_the_same(monkeypatch):
  monkeypatch.setattr(chain_module, "STEPS_BEFORE_LOWER", 5)
  steps = _steps(1, 24)
  whole, _ = _run(steps, lambda _: False)
  for stop in range(1, 24):
    before, chain = _run(steps[:stop], lambda _: False)
    after, _ = _run(
      steps[stop:],
      lambda _: False,
      chain.capacity,
      chain.raised_at,
      float(chain.state),
      stop + 1,
    )
    assert before + after == whole


def test_only_what_fits_is_applied_and_nothing_is_lost():
  steps = [(0.5, 1.0), (3.0, 1.0), (0.5, float("nan")), (0.5, 1.0)]
  seen, chain = _run(steps, lambda _: False)
  assert [applied for *_, applied in seen] == [True, True, False, True]
  assert [capacity for *_, capacity, _ in seen] == [0, 2, 2, 2]
  expected = list(itertools.accumulate((0.1, 0.2, 0.4), lambda s, x: 0.9 * s + x))
  np.testing.assert_allclose(float(chain.state), expected[-1], rtol=1e-6)


def test_counts_skip_capacities_that_cannot_hold():
  counts = np.array([[6, 1, 1, 0], [1, 1, 1, 1]])  # two ranks: loads 7 and 1, mean 4
  assert chain_module._least_capacity(counts, ranks=2) == 7 / 4
  assert chain_module._least_capacity(counts, ranks=1) == 1.0
  assert chain_module._least_capacity(np.zeros((0, 4)), ranks=2) == 1.0
