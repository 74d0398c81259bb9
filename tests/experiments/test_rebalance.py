"""The job that places experts by measured loads, and generation with what it wrote."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from deepseek_jax.config import Config, GenerateConfig, MeshConfig, RebalanceConfig
from deepseek_jax.io import workdir
from deepseek_jax.io.placement import read_placement
from deepseek_jax.train import loop
from experiments import jobs
from tests.small_runs import run, small_config

REBALANCE = "experiments/configs/rebalance.py"
SETTINGS = RebalanceConfig(redundant_experts=4, nodes=2, gpus=4)


def job_config(job: str, mesh: MeshConfig, **settings) -> Config:
  """For the eight devices that tests have."""
  train = dataclasses.replace(small_config().train, micro_batch_size=1)
  return Config(job=job, mesh=mesh, train=train, **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
  """A run stopped before its first step. Large random routers choose unevenly."""
  target = tmp_path_factory.mktemp("trained") / "run"
  config = small_config(ema_decay=0.0)
  model = dataclasses.replace(config.model, init_std=0.2)
  begun = loop.begin(
    dataclasses.replace(config, model=model), target, jax.devices()[:1]
  )
  loop._save(begun)
  loop._close(begun)
  return target


@pytest.fixture(scope="module")
def rebalanced(trained, tmp_path_factory) -> Path:
  """By the command line, on one device."""
  target = tmp_path_factory.mktemp("rebalanced") / "run"
  code, out, err = run(
    target,
    f"--config.generate.checkpoint={trained}",
    "--config.rebalance.gpus=4",
    "--config.rebalance.redundant_experts=4",
    "--config.train.micro_batch_size=8",
    "--config.train.eval_batches=2",
    config=f"{REBALANCE}:tiny",
  )
  assert code == 0, err
  (target / "stdout.txt").write_text(out)
  return target


def test_the_job_leaves_what_it_promises(trained, rebalanced):
  values = json.loads((rebalanced / "placement.json").read_text())
  assert values["measured"] == str(trained / "checkpoints" / "0")
  loads = np.array(values["loads"])  # of the MoE layer and of MTP's
  tokens = 2 * 8 * 32  # two batches of eight sequences
  assert loads.sum(1).tolist() == [tokens * 2] * 2
  placement = read_placement(rebalanced / "placement.json", small_config().model, 4)
  assert placement.expert_LR.shape == (2, 8 + 4)
  assert (rebalanced / "plots" / "gpu_load.png").read_bytes()[1:4] == b"PNG"
  said = (rebalanced / "stdout.txt").read_text()
  figures = re.findall(r": ([\d.]+) on average, ([\d.]+) in the worst layer", said)
  (before, worst_before), (after, worst_after) = np.array(figures, float)
  assert 1 <= after < before <= worst_before
  assert worst_after < worst_before
  for name in ("placement.json", "plots/gpu_load.png"):
    assert str(rebalanced / name) in said


def test_generation_with_the_placement(trained, rebalanced, tmp_path):
  """Greedy samples on a mesh with and without it are the same."""

  def sample(mesh: MeshConfig, **settings) -> str:
    generate = GenerateConfig(
      prompts=("def f(", "import"),
      max_new_tokens=12,
      checkpoint=str(trained),
      **settings,
    )
    jobs.generate(job_config("generate", mesh, generate=generate), str(tmp_path))
    return (tmp_path / "samples" / "generated_0.txt").read_text("utf-8")

  file = str(rebalanced / "placement.json")
  placed = sample(MeshConfig(data=2, expert=4), placement=file)
  assert placed == sample(MeshConfig(data=8))


def _fails(*arguments, **options) -> str:
  """The one line on stderr of a command that must end with exit code 1."""
  code, out, err = run(*arguments, **options)
  assert code == 1, (code, out, err)
  lines = err.strip().splitlines()
  assert len(lines) == 1, err
  return lines[0]


def test_a_placement_for_another_mesh_is_one_line(trained, rebalanced, tmp_path):
  line = _fails(
    tmp_path / "out",
    f"--config.generate.checkpoint={trained}",
    f"--config.generate.placement={rebalanced / 'placement.json'}",
    config="experiments/configs/generate.py:tiny",
  )
  assert "placement.json is for 4 GPUs, but the mesh splits experts over 1" in line
  assert not (tmp_path / "out").exists()


def rebalance(source: Path, folder: Path, **settings) -> None:
  options = RebalanceConfig(**(dataclasses.asdict(SETTINGS) | settings))
  generate = GenerateConfig(checkpoint=str(source))
  config = job_config(
    "rebalance", MeshConfig(data=8), rebalance=options, generate=generate
  )
  jobs.rebalance(config, str(folder))


def test_what_does_not_fit_is_refused(trained, tmp_path):
  for settings, says in (
    ({"gpus": 3, "nodes": 1}, r"rebalance\.gpus=3 must divide .*n_routed_experts=8"),
    ({"redundant_experts": 2}, r"redundant_experts=2 must be a multiple of .*gpus=4"),
    ({"nodes": 3}, r"rebalance\.nodes=3 must divide rebalance\.gpus=4"),
    ({"redundant_experts": -1}, r"redundant_experts=-1 must be >= 0"),
  ):
    with pytest.raises(ValueError, match=says):
      rebalance(trained, tmp_path / "out", **settings)
  with pytest.raises(FileNotFoundError, match="name the workdir of a training run"):
    rebalance(tmp_path, tmp_path / "out")
  imported = dataclasses.replace(small_config(), job="import")
  workdir.claim(imported, tmp_path / "imported")
  with pytest.raises(
    ValueError, match="no training run of a model with routed experts"
  ):
    rebalance(tmp_path / "imported", tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_too_little_data_for_two_parts(trained, tmp_path):
  config = job_config("rebalance", MeshConfig(data=8), rebalance=SETTINGS)
  train = dataclasses.replace(config.train, eval_batches=10_000)
  generate = GenerateConfig(checkpoint=str(trained))
  config = dataclasses.replace(config, train=train, generate=generate)
  with pytest.raises(ValueError, match=r"lower train\.eval_batches=10000"):
    jobs.rebalance(config, str(tmp_path / "out"))
