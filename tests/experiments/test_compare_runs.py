"""Comparing runs: metrics written by hand, whose differences are known."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import Config
from deepseek_jax.io import workdir
from deepseek_jax.io.checkpoint import Checkpoints
from deepseek_jax.mesh import make_mesh
from deepseek_jax.train.step import abstract_state
from experiments.benchmarks import compare_runs
from tests.train.test_step import make_config

LOSSES = 4 + np.sin(np.arange(1, 41))


def records(losses, **last):
  """Lines of a run with ten steps of warm-up; None is a step that was not finite."""
  lines = [
    {
      "step": step,
      "tokens": 100 * step,
      "loss": loss,
      "learning_rate": min(step / 10, 1.0),
      "tokens_per_second": 1000.0,
      "applied": loss is not None,
    }
    for step, loss in enumerate(losses, 1)
  ]
  lines[-1] |= last
  return lines


def write(folder: Path, lines) -> Path:
  folder.mkdir()
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "metrics.jsonl").write_text(text)
  return folder


def test_one_percent_everywhere_is_one_percent():
  base, other = records(LOSSES), records(LOSSES * 1.01)
  found = compare_runs.compare(base, other, skip=10, window=5)
  np.testing.assert_array_equal(found.steps, np.arange(11, 41))
  np.testing.assert_array_equal(found.smooth_steps, np.arange(15, 41))
  np.testing.assert_allclose(found.single, 0.01, rtol=1e-9)
  np.testing.assert_allclose(found.smoothed, 0.01, rtol=1e-9)
  assert found.first_apart == 1
  assert found.holds(0.0101)
  assert not found.holds(0.0099)


def test_a_single_step_counts_once_in_each_window_that_has_it():
  base, losses = records(np.full(40, 4.0)), np.full(40, 4.0)
  losses[4], losses[24] = 8.0, 4.4  # in the warm-up, and step 25
  found = compare_runs.compare(base, records(losses), skip=10, window=5)
  inside = (found.smooth_steps >= 25) & (found.smooth_steps < 30)
  np.testing.assert_allclose(found.smoothed[inside], 0.1 / 5, rtol=1e-9)
  np.testing.assert_allclose(found.smoothed[~inside], 0, atol=1e-12)
  assert found.steps[found.single.argmax()] == 25
  assert found.first_apart == 5


def test_unfinished_runs_and_steps_without_a_loss_are_matched_by_step():
  short = [*LOSSES[:30]]
  short[19] = None
  found = compare_runs.compare(records(LOSSES), records(short), skip=10, window=5)
  assert found.first_apart is None
  assert 20 not in found.steps
  assert found.steps[-1] == 30
  assert not found.single.any()
  with pytest.raises(ValueError, match="20 common steps after step 10 are fewer"):
    compare_runs.compare(records(LOSSES), records(LOSSES[:30]), skip=10, window=21)


def test_what_is_printed_and_drawn(tmp_path, capsys):
  base = write(tmp_path / "bf16", records(LOSSES, validation_loss=4.0))
  other = write(tmp_path / "fp8", records(LOSSES * 0.998, validation_loss=4.02))
  command = ["--base", str(base), "--others", str(other), "--window", "5"]
  compare_runs.main([*command, "--out", str(tmp_path / "curves.png")])
  printed = capsys.readouterr().out
  assert "fp8: 40 steps, 1,000 tokens/s" in printed
  assert "validation at step 40: 4.0200 (+0.500%)" in printed
  assert "30 steps compared, 11 to 40; first apart at step 1" in printed  # by the rate
  assert "-0.2000% on average, 0.2000% in magnitude" in printed
  assert "bound of 0.25%: holds" in printed
  assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"
  compare_runs.main([*command, "--bound", "0.001"])
  assert "bound of 0.1%: FAILS" in capsys.readouterr().out


def test_the_loss_of_mtp_instead(tmp_path, capsys):
  def with_mtp(scale):
    lines = records([None, *LOSSES[1:]], validation_mtp_loss=5 * scale)
    return [line | {"mtp_loss": 3 * scale} for line in lines]

  base = write(tmp_path / "bf16", with_mtp(1.0))
  other = write(tmp_path / "fp8", with_mtp(1.001))
  none = write(tmp_path / "none", records(LOSSES))
  command = ["--base", str(base), "--window", "5", "--mtp", "--others"]
  compare_runs.main([*command, str(other)])
  printed = capsys.readouterr().out
  assert "validation at step 40: 5.0050 (+0.100%)" in printed
  assert "loss of MTP against bf16, after step 10" in printed
  assert "first apart at step 2" in printed
  assert "+0.1000% on average" in printed
  with pytest.raises(SystemExit, match="none has no loss of MTP"):
    compare_runs.main([*command, str(none)])


def test_several_bases_are_their_mean(tmp_path, capsys):
  scales = {"a": 1.002, "b": 0.998, "fp8": 1.001}
  folders = [
    str(write(tmp_path / name, records(LOSSES * scale, validation_loss=4 * scale)))
    for name, scale in scales.items()
  ]
  command = ["--base", *folders[:2], "--others", folders[2], "--window", "5"]
  compare_runs.main([*command, "--out", str(tmp_path / "curves.png")])
  printed = capsys.readouterr().out
  assert "against the mean of a and b, after step 10" in printed
  for difference in ("+0.2000", "-0.2000", "+0.1000"):  # of a, b and fp8
    assert f"{difference}% on average" in printed
  assert "validation at step 40: 4.0040 (+0.100%)" in printed
  with pytest.raises(SystemExit, match="give one --base"):
    compare_runs.main([*command, "--biases"])


def save(folder: Path, config: Config, shift: float, step: int = 7) -> Path:
  """A workdir whose checkpoint has one bias that is `shift` away from the others."""
  workdir.claim(config, folder)
  bias = {
    name: jnp.zeros(array.shape).at[..., 3].set(shift)
    for name, array in abstract_state(
      config, make_mesh(devices=jax.devices()[:1])
    ).bias.items()
  }
  checkpoints = Checkpoints(folder / "checkpoints", keep=1, asynchronous=False)
  checkpoints.save(step, {"bias": bias, "step": jnp.zeros((), jnp.int32)}, {})
  checkpoints.close()
  return folder


def test_biases_are_counted_in_updates(tmp_path):
  config = make_config()
  rate = config.train.bias_update_rate
  base = save(tmp_path / "a", config, 0.0)
  other = save(tmp_path / "b", config, -4 * rate)
  layers, experts = compare_runs.read_biases(base)[1].shape
  line = compare_runs.compare_biases(base, other)
  assert f"after step 7, {layers} layers x {experts}" in line
  assert f"{layers * (experts - 1)} of {layers * experts} bit for bit" in line
  assert f"largest difference 4.00 updates of {rate:g}" in line
  later = save(tmp_path / "c", config, 0.0, step=8)
  with pytest.raises(ValueError, match=r"steps 7 .* and 8"):
    compare_runs.compare_biases(base, later)
