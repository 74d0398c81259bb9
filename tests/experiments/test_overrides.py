"""Configs of every variant, nearest keys, tuples on the command line, errors."""

import errno
import math

import pytest

from deepseek_jax.config import Config, TrainConfig
from deepseek_jax.io.plain import to_dict
from experiments import overrides
from experiments import run as command
from experiments.configs import generate, pretrain


@pytest.mark.parametrize("variant", pretrain.VARIANTS)
def test_every_variant_is_a_config(variant):
  values = pretrain.get_config(variant)
  config = overrides.to_config(values)
  assert to_dict(config) == values.to_dict()
  assert values.is_locked


def test_the_one_for_one_gpu_is_large_enough():
  from deepseek_jax.train.metrics import active_parameters

  model = overrides.to_config(pretrain.get_config("h100_100m")).model
  assert active_parameters(model) >= 100e6


@pytest.mark.parametrize(
  ("variant", "tokens"),
  [("v2", 8.1e12), ("v2_lite", 5.7e12), ("moe_16b", 2e12), ("moe_2b", 104.9e9)]
  + [("lf_1b", 94.4e9), ("lf_3b", 200e9)],
)
def test_published_tokens(variant, tokens):
  """Steps times full batch; V2's ramp takes fewer tokens, so more steps."""
  train = overrides.to_config(pretrain.get_config(variant)).train
  total = train.steps * train.batch_size * train.seq_len
  assert total == pytest.approx(tokens, rel=0.02)


@pytest.mark.parametrize(
  ("key", "nearest"),
  [
    ("train.step", "train.steps"),
    ("steps", "train.steps"),
    ("model.steps", "train.steps"),
    ("data.pth", "data.path"),
    ("mesh.experts", "mesh.expert"),
    ("model.n_routed_expert", "model.n_routed_experts"),
  ],
)
def test_nearest_key(key, nearest):
  assert overrides.nearest_key(key) == nearest


def test_unknown_key_of_a_config_file():
  values = pretrain.get_config("tiny").unlock()
  values.train.lerning_rate = 0.1
  with pytest.raises(ValueError, match=r"lerning_rate.*config\.train\.learning_rate"):
    overrides.to_config(values)


def test_prompts_are_texts():
  values = generate.get_config()
  values.generate.prompts = (42, "x")
  assert overrides.to_config(values).generate.prompts == ("42", "x")


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("(1.5, inf)", (1.5, math.inf)),
    ("1.5", (1.5,)),
    ("('a', 'b')", ("a", "b")),
    ("def f(a, b):", ("def f(a, b):",)),
    ("x = [1, 2", ("x = [1, 2",)),
    ("()", ()),
    ((1, 2), (1, 2)),
  ],
)
def test_tuples(text, value):
  assert overrides.TupleParser().parse(text) == value


def _raised(function) -> Exception:
  try:
    function()
  except Exception as error:
    return error
  raise AssertionError("nothing was raised")


def test_which_errors_are_one_line(tmp_path):
  ours = _raised(lambda: TrainConfig(steps=0))
  library = _raised(lambda: int("x"))
  bug = _raised(lambda: Config().absent)
  stopped = FloatingPointError("10 steps in a row were not finite")
  missing = _raised(lambda: (tmp_path / "absent").read_text())
  full = OSError(errno.ENOSPC, "No space left on device")
  wrapped = ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device")
  chained = RuntimeError("save failed")
  chained.__cause__ = full
  assert command.is_expected(ours)
  assert command.is_expected(stopped)
  assert not command.is_expected(library)
  assert not command.is_expected(bug)
  for error in (missing, full, wrapped, chained):
    assert command.is_expected(error)
    assert "\n" not in command.describe(error, "runs/x")
  assert "absent" in command.describe(missing, None)
  for error in (full, wrapped, chained):
    assert command.describe(error, "runs/x").startswith("no space left")
