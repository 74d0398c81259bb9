"""The loop in this process: retries, skipped steps, other meshes, refusals."""

import dataclasses
import json
import logging
import math

import jax
import numpy as np
import pytest

from deepseek_jax.config import Config, MeshConfig
from deepseek_jax.train import chain, loop
from tests.small_runs import (
  assert_same_checkpoint,
  read_checkpoint,
  read_lines,
  small_config,
)

ON_EIGHT = MeshConfig(data=2, expert=4)


def _train(config: Config, workdir, devices: int = 1):
  loop.train(config, workdir, jax.devices()[:devices])
  return read_lines(workdir)


@pytest.fixture(autouse=True)
def _needs_eight_devices():
  if len(jax.devices()) < 8:
    pytest.skip("needs eight devices")


@pytest.fixture(autouse=True)
def _without_samples(monkeypatch):
  """The end of a run is tested with the command line; it takes programs of its own."""
  monkeypatch.setattr(loop, "finish", lambda *_: None)


def _config(**settings) -> Config:
  """Without MTP, which test_step.py has on meshes: half of what is to be compiled."""
  config = small_config(**settings)
  model = dataclasses.replace(config.model, n_mtp_layers=0)
  return dataclasses.replace(config, model=model)


def _on_eight(capacities=(math.inf,), **settings) -> Config:
  config = _config(micro_batch_size=1, capacities=capacities, **settings)
  return dataclasses.replace(config, mesh=ON_EIGHT)


def test_resume_on_another_mesh_is_the_same_to_rounding(tmp_path):
  """Six steps on 2 x 4 devices, six on one; against twelve on one."""
  # FP32 moments: BF16 would turn a difference of 1e-7 into one of 2^-8.
  fp32 = {"moment_dtype": "float32"}
  _train(_config(**fp32), tmp_path / "one")
  _train(_on_eight(steps=6, **fp32), tmp_path / "moved", 8)
  lines = _train(_config(**fp32), tmp_path / "moved")
  for a, b in zip(read_lines(tmp_path / "one"), lines, strict=True):
    for name in ("loss", "grad_norm"):
      assert a[name] == pytest.approx(b[name], rel=2e-4), (name, a["step"])
    assert a["tokens"] == b["tokens"]
  one, moved = (read_checkpoint(tmp_path / name) for name in ("one", "moved"))
  assert one["loop"]["data"] == moved["loop"]["data"]
  for item in ("state", "ema"):
    arrays = jax.tree_util.tree_leaves_with_path(one[item])
    for (path, x), y in zip(arrays, jax.tree.leaves(moved[item]), strict=True):
      x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
      name = jax.tree_util.keystr(path)
      np.testing.assert_allclose(
        x, y, rtol=0, atol=2e-3 * (1e-3 + np.abs(x).max()), err_msg=name
      )


def test_overflow_is_retried_and_nothing_is_dropped(tmp_path, caplog, monkeypatch):
  """Bit for bit the run that never had a bound, even as lower bounds are tried."""
  monkeypatch.setattr(chain, "STEPS_BEFORE_LOWER", 4)
  bounded = _on_eight(steps=7, capacities=(0.25, math.inf))
  free = _on_eight(steps=7)
  with caplog.at_level(logging.WARNING, "deepseek_jax"):
    lines = _train(bounded, tmp_path / "bounded", 8)
  expected = _train(free, tmp_path / "free", 8)
  assert [line["retries"] for line in lines] == [1, 0, 0, 0, 1, 0, 0]
  assert all(line["applied"] for line in lines)
  assert "step 1: expert dispatch overflowed capacity 0.25" in caplog.text
  for a, b in zip(lines, expected, strict=True):
    assert {**a, "retries": 0} == b
  _forget_capacity(tmp_path / "bounded")
  _forget_capacity(tmp_path / "free")
  assert_same_checkpoint(tmp_path / "bounded", tmp_path / "free")


def _forget_capacity(workdir) -> None:
  path = workdir / "checkpoints" / "7" / "loop" / "metadata"
  loop = json.loads(path.read_text())
  del loop["progress"]["capacity"], loop["progress"]["raised_at"]
  path.write_text(json.dumps(loop))


def test_steps_that_are_not_finite_are_not_applied(tmp_path, caplog):
  """An infinite learning rate spoils the weights at once; then nothing is applied."""
  config = small_config(learning_rate=math.inf, max_bad_steps=3, ema_decay=0.0)
  with (
    caplog.at_level(logging.WARNING, "deepseek_jax"),
    pytest.raises(
      FloatingPointError, match=r"3 steps in a row|4 steps in a row"
    ) as stop,
  ):
    _train(config, tmp_path)
  assert "train.learning_rate" in str(stop.value)
  assert "was not applied" in caplog.text
  lines = read_lines(tmp_path)
  assert lines[0]["applied"]
  assert not any(line["applied"] for line in lines[1:])
  assert lines[-1]["loss"] is None
  assert lines[-1]["skipped"] == len(lines) - 1
  saved = read_checkpoint(tmp_path)
  assert saved["step"] == len(lines) < 12
  assert saved["state"]["step"] == 1
  assert saved["loop"]["progress"]["bad_in_a_row"] == len(lines) - 1


def test_missing_data_is_refused_before_anything_is_written(tmp_path):
  config = small_config()
  missing = dataclasses.replace(config.data, path=str(tmp_path / "absent"))
  with pytest.raises((FileNotFoundError, ValueError), match="absent"):
    _train(dataclasses.replace(config, data=missing), tmp_path / "run")
  assert not (tmp_path / "run" / "config.json").exists()


def test_mesh_must_fit_the_devices(tmp_path):
  config = dataclasses.replace(small_config(micro_batch_size=1), mesh=ON_EIGHT)
  with pytest.raises(ValueError, match="needs 8 devices, but 4 are present"):
    _train(config, tmp_path / "run", 4)
  assert not (tmp_path / "run").exists()
