"""A run small enough to start many times: a config file, and how to start it.

`--config=tests/small_runs.py` gives `small_config()` to a program.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax import presets
from deepseek_jax.config import (
  CheckpointConfig,
  Config,
  DataConfig,
  GenerateConfig,
  ScheduleConfig,
  TrainConfig,
)

ROOT = Path(__file__).resolve().parent.parent
TEXT = str(Path(json.__file__).parent / "*.py")  # about 60 KB of real code
TIMES = {"seconds", "tokens_per_second"}  # the fields that no two runs share
_CONSTANT = ((math.inf, "constant", 1.0),)


def small_config(**train: Any) -> Config:
  """One MoE layer and MTP of width 32, 12 steps of 8 sequences of 32 tokens."""
  model = dataclasses.replace(
    presets.TINY,
    name="small",
    vocab_size=384,
    dim=32,
    inter_dim=64,
    moe_inter_dim=16,
    n_layers=1,
    n_dense_layers=0,
    n_heads=2,
    q_lora_rank=0,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=8,
    n_activated_experts=2,
    n_expert_groups=1,
    n_limited_groups=1,
    max_seq_len=128,
  )
  schedule = ScheduleConfig(
    total_tokens=4096.0,
    learning_rate=((512.0, "linear", 1.0), (math.inf, "constant", 1.0)),
    bias_update_rate=_CONSTANT,
    mtp_weight=((math.inf, "constant", 0.3),),
    batch_size=_CONSTANT,
  )
  settings = {
    "steps": 12,
    "batch_size": 8,
    "micro_batch_size": 8,
    "seq_len": 32,
    "learning_rate": 3e-3,
    "schedule": schedule,
    "remat": "none",
    "eval_batches": 2,
    "ema_decay": 0.9,
  }
  return Config(
    precision="fp32",
    model=model,
    train=TrainConfig(**(settings | train)),
    data=DataConfig(path=TEXT, tokenizer_vocab=384, validation_fraction=0.2),
    checkpoint=CheckpointConfig(every=3, keep=2),
    generate=GenerateConfig(max_new_tokens=8),
  )


def get_config():
  from experiments.overrides import to_config_dict

  return to_config_dict(small_config())


def start(
  workdir: Path,
  *arguments: str,
  config: str = "tests/small_runs.py",
  program: str = "experiments.run",
  devices: int = 1,
):
  """Starts `experiments.run` on simulated CPU devices; the caller waits for it."""
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  environment["JAX_NUM_CPU_DEVICES"] = str(devices)
  flags = environment.get("XLA_FLAGS", "").split()
  environment["XLA_FLAGS"] = " ".join(f for f in flags if "device_count" not in f)
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      program,
      f"--config={config}",
      f"--workdir={workdir}",
      *arguments,
    ],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(workdir: Path, *arguments: str, **options: Any) -> tuple[int, str, str]:
  """Exit code, stdout and stderr of `start`."""
  process = start(workdir, *arguments, **options)
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


def read_lines(workdir: Path) -> list[dict[str, Any]]:
  """metrics.jsonl without what no two runs share."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
    {key: value for key, value in json.loads(line).items() if key not in TIMES}
    for line in lines
  ]


def read_checkpoint(workdir: Path) -> dict[str, Any]:
  """Everything in the newest checkpoint: arrays by item and path, and the counters."""
  import jax
  import orbax.checkpoint as ocp

  folder = workdir / "checkpoints"
  step = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
  loop = json.loads((folder / str(step) / "loop" / "metadata").read_text())
  del loop["progress"]["seconds"]
  found: dict[str, Any] = {"step": step, "loop": loop}
  for item in ("state", "ema"):
    path = folder / str(step) / item
    if path.is_dir():
      reader = ocp.PyTreeCheckpointer()
      metadata: Any = reader.metadata(path).item_metadata
      as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
        metadata.tree,
      )
      found[item] = reader.restore(path, restore_args=as_numpy)
  return found


def assert_same_checkpoint(one: Path, other: Path) -> None:
  """Bit for bit."""
  import jax

  a, b = read_checkpoint(one), read_checkpoint(other)
  assert (a["step"], a["loop"]) == (b["step"], b["loop"])
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
    if isinstance(x, np.ndarray | jax.Array):
      np.testing.assert_array_equal(
        np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path)
      )
