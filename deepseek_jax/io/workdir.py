"""A workdir belongs to one config: config.json says which.

A run may be continued with other values of the settings below only. They change where
and for how long it runs and what it reports, not which numbers it computes (beyond
rounding); anything else would continue another model's state, or another recipe.
"""

import json
from pathlib import Path
from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.io.plain import from_dict, to_dict

_MAY_CHANGE = (
  "job",  # generate and evaluate read the workdir of a pretrain run
  "mesh.",  # checkpoints do not depend on the mesh
  "train.micro_batch_size",  # how a global batch is cut, as the mesh
  "train.remat",  # recomputation
  "train.steps",  # train longer (a schedule with fit_to_run stretches)
  "train.capacities",  # bounds of buffers; no token is dropped under any
  "train.max_bad_steps",  # when to give up
  "train.log_every",
  "train.eval_every",
  "train.eval_batches",
  "checkpoint.",
  "data.workers",  # reading ahead; the order of samples stays
  "generate.",
  "rebalance.",
)


def check(config: Config, workdir: str | Path) -> None:
  """Refuses a workdir in which a run of `config` may not go on; changes nothing.

  Raises:
    ValueError: it belongs to another config; the differing settings are named.
  """
  if (Path(workdir) / "config.json").exists():
    _refuse_differences(read(workdir), config, workdir)
  elif any(path.name.isdigit() for path in Path(workdir).glob("checkpoints/*")):
    raise ValueError(
      f"{workdir} has checkpoints but no config.json to say whose they are: "
      "use another workdir"
    )


def claim(config: Config, workdir: str | Path) -> None:
  """Writes config.json, after `check` and when the run is sure to begin."""
  path = Path(workdir) / "config.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix(".part")
  text = json.dumps(to_dict(config), indent=2, ensure_ascii=False)
  temporary.write_text(text + "\n", encoding="utf-8")
  temporary.rename(path)


def read(workdir: str | Path) -> Config:
  """The config that a workdir belongs to.

  Raises:
    FileNotFoundError: it is no workdir.
    ValueError: its config.json cannot be read.
  """
  path = Path(workdir) / "config.json"
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist: name the workdir of a training run"
    )
  try:
    return from_dict(Config, json.loads(path.read_text("utf-8")))
  except (ValueError, TypeError) as error:
    raise ValueError(f"{path} is not a readable config ({error})") from error


def _refuse_differences(before: Config, now: Config, workdir: str | Path) -> None:
  old, new = (flatten(to_dict(config)) for config in (before, now))
  differing = [
    f"{key} is {_show(old[key])} there and {_show(new[key])} here"
    for key in new
    if old[key] != new[key] and not key.startswith(_MAY_CHANGE)
  ]
  if differing:
    raise ValueError(
      f"{workdir} belongs to another config: {'; '.join(differing)}: "
      "use another workdir, or give these settings their values there"
    )


def _show(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 120 else text[:117] + "..."


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """{'train': {'steps': 1}} as {'train.steps': 1}."""
  flat: dict[str, Any] = {}
  for name, value in nested.items():
    if isinstance(value, dict):
      flat.update(flatten(value, f"{prefix}{name}."))
    else:
      flat[prefix + name] = value
  return flat
