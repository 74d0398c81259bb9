"""Two real processes on one machine, two devices each: loopback and Gloo collectives.

Experts are split over all four devices, so that tokens cross between the processes.
"""

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from deepseek_jax.io.workdir import read as read_config
from deepseek_jax.train import loop
from tests.small_runs import (
  ROOT,
  assert_same_checkpoint,
  read_checkpoint,
  read_lines,
  run,
  start,
)

STEPS = 50
FOUR = (
  "--config.mesh.expert=4",
  "--config.train.micro_batch_size=2",
  "--config.train.capacities=(inf,)",
  "--config.checkpoint.every=5",
  "--config.train.moment_dtype=float32",  # BF16 makes 2^-8 of a difference of 1e-7
  "--config.model.n_mtp_layers=0",  # half the time of compiling
)
PEER_TIMEOUT = 20
LATEST = 60  # seconds in which the other process must have ended


def _free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("localhost", 0))
    return listener.getsockname()[1]


def _place(address: str, process: int) -> list[str]:
  return [
    f"--coordinator={address}",
    "--processes=2",
    f"--process={process}",
    f"--peer_timeout={PEER_TIMEOUT}",
  ]


def _start_pair(workdir: Path, *arguments: str) -> list[subprocess.Popen]:
  """The processes 0 and 1 of a run of `STEPS` steps."""
  address = f"localhost:{_free_port()}"
  return [
    start(
      workdir,
      *FOUR,
      f"--config.train.steps={STEPS}",
      *_place(address, process),
      *arguments,
      program="tests.two_processes",
      devices=2,
    )
    for process in range(2)
  ]


def _finish(pair: list[subprocess.Popen], timeout: float = 400) -> list[str]:
  """What the processes said on stderr; both must have ended with 0."""
  said = [process.communicate(timeout=timeout)[1] for process in pair]
  assert [process.returncode for process in pair] == [0, 0], "\n---\n".join(said)
  return said


def _wait_for_line(workdir: Path, pair: list[subprocess.Popen], step: int) -> None:
  """Returns soon after the metrics of that step are there."""
  path = workdir / "metrics.jsonl"
  deadline = time.monotonic() + 400
  while time.monotonic() < deadline and all(p.poll() is None for p in pair):
    if path.exists() and path.read_text().count("\n") >= step:
      return
    time.sleep(0.01)
  raise AssertionError("\n---\n".join(process.communicate()[1] for process in pair))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
  """The workdir of a run by two processes that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("whole") / "run"
  _finish(_start_pair(workdir))
  return workdir


def test_two_processes_are_one_to_rounding(whole, tmp_path, monkeypatch):
  """As one process on the same mesh, which also goes on where the two stopped."""
  if len(jax.devices()) < 4:
    pytest.skip("needs four devices")
  monkeypatch.setattr(loop, "finish", lambda *_: None)
  trained = read_config(whole)
  longer = dataclasses.replace(trained.train, steps=STEPS + 3)
  config = dataclasses.replace(trained, train=longer)
  shutil.copytree(whole, tmp_path / "moved")
  for name in ("one", "moved"):
    loop.train(config, tmp_path / name, jax.devices()[:4])
  one, two, moved = (
    read_lines(path) for path in (tmp_path / "one", whole, tmp_path / "moved")
  )
  assert [line["step"] for line in two] == list(range(1, STEPS + 1))
  assert moved[:STEPS] == two
  for a, b in zip(one, moved, strict=True):
    assert (a["step"], a["tokens"]) == (b["step"], b["tokens"])
    for name in ("loss", "grad_norm"):
      assert a[name] == pytest.approx(b[name], rel=1e-3), (name, a["step"])
  assert one[-1]["validation_loss"] == pytest.approx(
    moved[-1]["validation_loss"], rel=1e-3
  )
  a, b = (read_checkpoint(tmp_path / name) for name in ("one", "moved"))
  assert a["loop"]["data"] == b["loop"]["data"]


def test_one_process_alone_writes_what_people_read(whole):
  assert (whole / "samples" / f"step_{STEPS}.txt").stat().st_size > 0
  assert (whole / "plots" / "loss.png").stat().st_size > 0
  assert len(list((whole / "data").iterdir())) == 1
  written = {path.name for path in (whole / "checkpoints" / str(STEPS)).rglob("*")}
  assert {"ocdbt.process_0", "ocdbt.process_1", "manifest.json"} <= written


def _is_last_word(process: int, err: str) -> bool:
  """Whether a process ended with the line about a lost one, and no traceback."""
  last = err.strip().splitlines()[-1]
  return (
    last.startswith(f"error: process {process} of 2 ")
    and "another one" in last
    and "continue from the last whole checkpoint" in last
    and "Traceback" not in err
  )


def test_stopped_killed_and_resumed_is_bit_identical(whole, tmp_path):
  """SIGTERM to one process, kill -9 of one, then of the other, then to the end."""
  workdir = tmp_path / "run"
  pair = _start_pair(workdir)
  _wait_for_line(workdir, pair, 2)
  pair[1].send_signal(signal.SIGTERM)
  said = _finish(pair)
  assert "stopping all, with a checkpoint" in said[0]
  stopped = read_checkpoint(workdir)["step"]
  assert read_lines(workdir)[-1]["step"] == stopped < STEPS - 10
  for killed, step in ((1, stopped + 5), (0, stopped + 10)):
    pair = _start_pair(workdir)
    _wait_for_line(workdir, pair, step)
    pair[killed].kill()
    _, err = pair[1 - killed].communicate(timeout=LATEST)
    assert pair[1 - killed].returncode not in (0, None)
    assert _is_last_word(1 - killed, err), err
    pair[killed].communicate()
  _finish(_start_pair(workdir))
  assert read_lines(workdir) == read_lines(whole)
  assert_same_checkpoint(workdir, whole)


# Joins, in the way that the test gives, and does what it says.
MEMBER = """
import os, time
import jax
from jax._src.clusters import cloud_tpu_cluster
from deepseek_jax.meeting import Place
from deepseek_jax.processes import Group
{join}
print("joined", flush=True)
{then}
"""


def _start_members(
  join: str, then: str, *environments: dict[str, str]
) -> list[subprocess.Popen]:
  program = MEMBER.format(join=join, then=then)
  return [
    subprocess.Popen(
      [sys.executable, "-c", program],
      cwd=ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for environment in environments
  ]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_waits_ends_as_well(killed):
  """As in a collective that hangs: NCCL's do when a process is gone."""
  join = f"place = Place('localhost:{_free_port()}', 2, int(os.environ['PROCESS']))\n"
  join += "group = Group(place, 60, 4)"
  pair = _start_members(join, "time.sleep(300)", {"PROCESS": "0"}, {"PROCESS": "1"})
  for process in pair:
    assert process.stdout is not None
    assert process.stdout.readline() == "joined\n"
  pair[killed].kill()
  _, err = pair[1 - killed].communicate(timeout=30)
  assert pair[1 - killed].returncode not in (0, None)
  assert _is_last_word(1 - killed, err), err
  pair[killed].communicate()


SLURM = {
  "SLURM_JOB_ID": "17",
  "SLURM_STEP_NODELIST": "localhost",
  "SLURM_NTASKS": "2",
  "SLURM_LOCALID": "{process}",
  "SLURM_PROCID": "{process}",
}
GKE = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost,localhost",
  "TPU_WORKER_ID": "{process}",
  "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
  "MEGASCALE_NUM_SLICES": "1",
  "MEGASCALE_SLICE_ID": "0",
}


@pytest.mark.parametrize("cluster", [SLURM, GKE], ids=["SLURM", "GKE"])
def test_the_environment_says_which_process_it_is(cluster):
  """There is no TPU here, without which JAX would not look at GKE's variables."""
  join = f"cloud_tpu_cluster.running_in_cloud_tpu_vm = {cluster is GKE}\n"
  join += "group = Group(None, 60, 20)"
  then = "print(group.process, jax.process_index(), jax.process_count())\ngroup.leave()"
  port = {"JAX_COORDINATOR_PORT": str(_free_port())}
  pair = _start_members(
    join,
    then,
    *(port | {k: v.format(process=i) for k, v in cluster.items()} for i in range(2)),
  )
  for number, process in enumerate(pair):
    out, err = process.communicate(timeout=LATEST)
    assert process.returncode == 0, err
    assert f"joined\n{number} {number} 2\n" in out


def _fails(workdir: Path, *arguments: str) -> str:
  """The one line on stderr of a command that must end with exit code 1."""
  code, out, err = run(workdir, *FOUR, *arguments, devices=4)
  assert (code, out) == (1, ""), err
  (line,) = err.strip().splitlines()
  assert line.startswith("error: ")
  assert not workdir.exists()
  return line


ALONE = "--coordinator=localhost:9"
MISTAKES = {
  (ALONE, "--processes=2"): r"missing --process: .* belong together",
  (ALONE, "--processes=2", "--process=2"): r"process=2 must be one of 0 to 1",
  (ALONE, "--processes=2", "--process=one"): r"--process=one",
  ("--coordinator=localhost", "--processes=2", "--process=0"): r"must be HOST:PORT",
  (ALONE, "--processes=2", "--process=1", "--join_timeout=1"): (
    r"process 1 did not meet process 0 at localhost:9 within 1 s .*refused"
  ),
  (ALONE, "--processes=1", "--process=0", "--config.job=export"): r"for one process",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_mistakes_are_one_line(tmp_path, arguments):
  assert re.search(MISTAKES[arguments], _fails(tmp_path / "run", *arguments))


def test_no_cluster_in_the_environment(tmp_path, monkeypatch):
  for name in list(os.environ):
    if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "MEGASCALE_")):
      monkeypatch.delenv(name)
  assert re.search(
    r"no cluster could be joined .*coordinator_address.* elsewhere give",
    _fails(tmp_path / "run", "--distributed"),
  )


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (
      ("--processes=3",),
      r"error: process 1 was told of 3 processes and process 0 of 2: .*",
    ),
    (("--config.seed=1",), r"error: process 1 has .*: seed is 0 in process 0 and 1 .*"),
  ],
  ids=("number of processes", "settings"),
)
def test_processes_that_do_not_fit_together(tmp_path, arguments, says):
  workdir = tmp_path / "run"
  address = f"localhost:{_free_port()}"
  pair = [
    start(workdir, *FOUR, *_place(address, process), *(arguments if process else ()))
    for process in range(2)
  ]
  said = [process.communicate(timeout=LATEST)[1].strip() for process in pair]
  assert [process.returncode for process in pair] == [1, 1]
  last = [err.splitlines()[-1] for err in said]
  assert last[0] == last[1]
  assert re.fullmatch(says, last[0])
