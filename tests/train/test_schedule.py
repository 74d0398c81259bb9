"""The published schedules at the tokens where they turn."""

import dataclasses
import math

import pytest

from deepseek_jax.config import ScheduleConfig, TrainConfig
from deepseek_jax.train.schedule import Recipe, piecewise

V3 = TrainConfig()


@pytest.mark.parametrize(
  ("tokens", "rate"),
  [
    (0, 0.0),
    (12.6e9, 1.1e-4),
    (25.2e9, 2.2e-4),
    (9.9e12, 2.2e-4),
    (12.15e12, 1.21e-4),  # half way down the cosine
    (14.3e12, 2.2e-5),
    (14.6e12, 2.2e-5),
    (14.7e12, 7.3e-6),
    (20e12, 7.3e-6),
  ],
)
def test_learning_rate_of_v3(tokens, rate):
  value = V3.learning_rate * piecewise(V3.schedule.learning_rate, tokens)
  assert math.isclose(value, rate, rel_tol=1e-9, abs_tol=1e-12)


def test_gamma_lambda_and_batch_of_v3():
  recipe = Recipe(V3)
  assert recipe.at(0).batch_size == 3072
  assert recipe.at(469e9).batch_size == 15360
  assert recipe.at(234.5e9).batch_size == 9216
  assert recipe.at(14.2e12).bias_update_rate == 1e-3
  assert recipe.at(14.4e12).bias_update_rate == 0
  assert recipe.at(9e12).mtp_weight == 0.3
  assert recipe.at(11e12).mtp_weight == 0.1


def test_steps_of_v2():
  pieces = (
    (10.0, "linear", 1.0),
    (60.0, "constant", 1.0),
    (90.0, "constant", 0.316),
    (math.inf, "constant", 0.316**2),
  )
  values = [piecewise(pieces, t) for t in (5, 60, 61, 90, 91)]
  assert values == [0.5, 1.0, 0.316, 0.316, 0.316**2]


def test_a_recipe_fits_the_run():
  schedule = dataclasses.replace(
    V3.schedule, fit_to_run=True, batch_size=((math.inf, "constant", 1.0),)
  )
  train = TrainConfig(steps=1000, batch_size=8, seq_len=64, schedule=schedule)
  recipe = Recipe(train)
  # The rate is that of the step's end, hence one step earlier.
  half = 1000 * 8 * 64 * 12.15 / 14.8 - 8 * 64
  assert math.isclose(recipe.at(half).learning_rate, 1.21e-4, rel_tol=1e-9)
  assert recipe.at(0).learning_rate > 0


def test_batches_are_multiples_of_the_rows():
  recipe = Recipe(dataclasses.replace(V3, batch_size=15360), rows=2048)
  assert recipe.at(0).batch_size == 4096
  assert recipe.at(469e9).batch_size % 2048 == 0


def test_disordered_pieces_are_refused():
  with pytest.raises(ValueError, match="learning_rate must be ordered"):
    ScheduleConfig(learning_rate=((2.0, "linear", 1.0), (1.0, "constant", 1.0)))
  with pytest.raises(ValueError, match="shape 'step'"):
    ScheduleConfig(mtp_weight=((2.0, "step", 1.0),))
