"""The command line as a user meets it: programs that run, are stopped, are killed."""

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from deepseek_jax.config import Config
from deepseek_jax.io.plain import from_dict
from tests.small_runs import (
  assert_same_checkpoint,
  read_checkpoint,
  read_lines,
  run,
  small_config,
  start,
)

PRETRAIN = "experiments/configs/pretrain.py"
STEPS = "--config.train.steps=30"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
  """The workdir of a run of 30 steps that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  code, out, err = run(workdir, STEPS)
  assert code == 0, err
  (workdir / "stdout.txt").write_text(out)
  return workdir


def test_a_run_leaves_what_it_promises(whole):
  lines = [json.loads(x) for x in (whole / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == list(range(1, 31))
  promised = (
    "step loss mtp_loss grad_norm learning_rate tokens tokens_per_second max_vio "
    "max_vio_layers balance_loss gate_entropy bias_update_rate mtp_weight capacity "
    "skipped seconds"
  )
  for line in lines:
    assert set(promised.split()) <= set(line)
  assert lines[-1]["tokens"] == 30 * 8 * 32
  assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
  assert lines[-1]["bits_per_byte"] > 0
  assert lines[-1]["validation_loss"] == pytest.approx(lines[-1]["loss"], abs=1.0)
  for name in ("plots/loss.png", "plots/expert_load.png", "samples/step_30.txt"):
    assert (whole / name).stat().st_size > 0
  stored = json.loads((whole / "config.json").read_text())
  assert from_dict(Config, stored) == small_config(steps=30)
  said = (whole / "stdout.txt").read_text()
  for name in ("checkpoints", "metrics.jsonl", "plots", "samples"):
    assert str(whole / name) in said


def _kill_after(workdir: Path, lines: int, number: signal.Signals) -> tuple[int, str]:
  """Starts the run and sends a signal soon after that line of metrics."""
  process = start(workdir, STEPS)
  path = workdir / "metrics.jsonl"
  deadline = time.monotonic() + 240
  while process.poll() is None and time.monotonic() < deadline:
    if path.exists() and path.read_text().count("\n") >= lines:
      break
    time.sleep(0.005)
  time.sleep(random.uniform(0, 0.1))
  process.send_signal(number)
  _, err = process.communicate(timeout=240)
  return process.returncode, err


def test_killed_stopped_and_resumed_is_bit_identical(whole, tmp_path):
  """kill -9 twice, then SIGTERM, then to the end."""
  workdir = tmp_path / "run"
  code, _ = _kill_after(workdir, 4, signal.SIGKILL)
  assert code == -signal.SIGKILL
  code, _ = _kill_after(workdir, 13, signal.SIGKILL)
  assert code == -signal.SIGKILL
  code, err = _kill_after(workdir, 20, signal.SIGTERM)
  assert code == 0, err
  assert "SIGTERM" in err
  stopped = read_checkpoint(workdir)["step"]
  assert read_lines(workdir)[-1]["step"] == stopped < 30
  code, _, err = run(workdir, STEPS)
  assert code == 0, err
  assert f"resumed from the checkpoint of step {stopped}" in err
  assert read_lines(workdir) == read_lines(whole)
  assert_same_checkpoint(workdir, whole)


def test_ctrl_c_before_the_first_step_is_no_error(tmp_path):
  process = start(tmp_path / "run", STEPS)
  while process.poll() is None and not (tmp_path / "run" / "tokenizer.json").exists():
    time.sleep(0.01)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=240)
  assert process.returncode == 0, err
  assert "Traceback" not in err
  assert "SIGINT" in err


def test_generate_and_evaluate(whole, tmp_path):
  prompt = "def f(a, b):"
  code, out, err = run(
    tmp_path / "out",
    f"--config.generate.checkpoint={whole}",
    f"--config.generate.prompts={prompt}",
    "--config.generate.max_new_tokens=8",
    config="experiments/configs/generate.py:tiny",
  )
  assert code == 0, err
  assert prompt in out
  assert (tmp_path / "out" / "samples" / "generated_30.txt").exists()
  code, out, err = run(whole, "--config.job=evaluate")
  assert code == 0, err
  found = json.loads(out.splitlines()[-1])
  last = read_lines(whole)[-1]
  assert found["step"] == 30
  assert found["validation_loss"] == pytest.approx(last["validation_loss"], rel=1e-5)
  assert found["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-5)


def _fails(*arguments, **options) -> str:
  """The one line on stderr of a command that must end with exit code 1."""
  code, out, err = run(*arguments, **options)
  assert code == 1, (code, out, err)
  assert out == ""
  lines = err.strip().splitlines()
  assert len(lines) == 1, err
  assert lines[0].startswith("error: ")
  return lines[0]


BAD = {
  "--config.train.stepz=3": r"config\.train\.stepz.*config\.train\.steps",
  "--config.steps=3": r"config\.steps.*config\.train\.steps",
  "--config.train.steps=many": r"config\.train\.steps=many",
  "--config.train.steps=0": r"train\.steps=0 must be >= 1",
  "--config.mesh.expert=3": r"mesh\.expert=3 must divide",
  "--config.train.capacities=(1.5,2.0)": r"end in inf",
  "--config.train.capacities=('a',)": r"wrong type",
  "--config.job=dance": r"job='dance' is unknown",
  "--wokdir=x": r"workdir",
}


@pytest.mark.parametrize("argument", BAD)
def test_bad_settings_are_one_line(tmp_path, argument):
  assert re.search(BAD[argument], _fails(tmp_path / "run", argument))
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("config", "says"),
  [
    ("absent.py", "absent.py.*does not exist"),
    (f"{PRETRAIN}:huge", "no variant 'huge': use one of tiny"),
    (f"{PRETRAIN}:v3", r"checkpoints of [\d,.]+ GB.*checkpoint\.keep"),
    ("experiments/configs/generate.py", "name the workdir of a training run"),
  ],
)
def test_bad_configs_are_one_line(tmp_path, config, says):
  assert re.search(says, _fails(tmp_path / "run", config=config))
  assert not (tmp_path / "run").exists()


def test_workdir_of_another_config(whole, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
  line = _fails(workdir, STEPS, "--config.train.learning_rate=0.5")
  assert "train.learning_rate is 0.003 there and 0.5 here" in line
  line = _fails(workdir, STEPS, "--config.seed=1", "--config.model.dim=64")
  assert "seed is 0 there and 1 here" in line
  assert "model.dim is 32 there and 64 here" in line
  assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_damaged_checkpoints(whole, tmp_path):
  """The newest is named and skipped; with all damaged, one line and no change."""
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  _flip_a_bit(workdir / "checkpoints" / "30")
  code, _, err = run(workdir, STEPS)
  assert code == 0, err
  assert re.search(r"checkpoints/30 is damaged and skipped", err)
  assert "resumed from the checkpoint of step 27" in err
  assert (workdir / "checkpoints" / "damaged-30").is_dir()
  assert read_lines(workdir) == read_lines(whole)
  assert_same_checkpoint(workdir, whole)
  for path in (workdir / "checkpoints").glob("[0-9]*"):
    _flip_a_bit(path)
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
  code, _, err = run(workdir, STEPS)
  assert code == 1
  last = err.strip().splitlines()[-1]
  assert re.search(r"error: none of the \d checkpoints in .* can be read", last)
  assert "Traceback" not in err
  assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def _flip_a_bit(checkpoint: Path) -> None:
  files = (path for path in (checkpoint / "state").rglob("*") if path.is_file())
  path = max(files, key=lambda file: file.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))
