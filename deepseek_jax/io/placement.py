"""The file of a placement: JSON that says which expert each place holds.

    {"gpus": 8, "nodes": 2, "n_routed_experts": 16,
     "measured": "runs/x/checkpoints/200", "loads": [[...], ...],
     "experts": [[...], ...]}

`experts` has a row for each layer with routed experts, MTP's last, and in it the
expert at each place; place p is on GPU p // (places / gpus). `loads` are the tokens
that chose each expert in the measurement, of the checkpoint `measured`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.config import RebalanceConfig
from deepseek_jax.dense_config import DenseConfig
from deepseek_jax.io.hf_names import AnyConfig
from deepseek_jax.parallel.eplb import Placement, as_placement


def write_placement(
  path: Path,
  placement: Placement,
  loads_LE: np.ndarray,
  settings: RebalanceConfig,
  measured: str,
) -> None:
  """Writes the file, whole or not at all; `measured` says what loads were taken on."""
  values = {
    "gpus": settings.gpus,
    "nodes": settings.nodes,
    "n_routed_experts": placement.copies_LE.shape[1],
    "measured": measured,
    "loads": np.asarray(loads_LE).tolist(),
    "experts": placement.expert_LR.tolist(),
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_suffix(".part")
  part.write_text(json.dumps(values, ensure_ascii=False) + "\n", "utf-8")
  part.rename(path)


def read_placement(path: str | Path, config: AnyConfig, gpus: int) -> Placement:
  """A placement for a model that `gpus` GPUs split the routed experts of.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no placement, or one for another model or number of GPUs.
  """
  if not Path(path).is_file():
    raise FileNotFoundError(
      f"generate.placement={path} does not exist: name the file that the job "
      "rebalance wrote"
    )
  try:
    placement, meant = _parse(json.loads(Path(path).read_text("utf-8")))
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(
      f"generate.placement={path} is no placement ({type(error).__name__}: {error}): "
      "write it again with the job rebalance"
    ) from error
  found, wanted = placement.copies_LE.shape, routed_shape(config)
  if found != wanted:
    raise ValueError(
      f"generate.placement={path} is for {found[0]} layers of {found[1]} routed "
      f"experts, but the model has {wanted[0]} of {wanted[1]}: measure the loads of "
      "this model with the job rebalance"
    )
  if meant != gpus:
    raise ValueError(
      f"generate.placement={path} is for {meant} GPUs, but the mesh splits experts "
      f"over {gpus} (mesh.node x mesh.expert): change one"
    )
  return placement


def routed_shape(config: AnyConfig) -> tuple[int, int]:
  """Layers with routed experts, MTP's included, and experts of each."""
  if isinstance(config, DenseConfig):
    return 0, 0
  return config.n_moe_layers + config.n_mtp_layers, config.n_routed_experts


def _parse(values: dict[str, Any]) -> tuple[Placement, int]:
  """The placement and its number of GPUs."""
  experts, gpus = int(values["n_routed_experts"]), int(values["gpus"])
  placement = as_placement(np.array(values["experts"]), experts)
  places = placement.expert_LR.shape[1]
  if gpus < 1 or places % gpus:
    raise ValueError(f"{gpus} GPUs cannot share {places} places evenly")
  return placement, gpus
