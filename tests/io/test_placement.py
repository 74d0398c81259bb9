"""The file of a placement: what was written is read, and what does not fit is named."""

import dataclasses
import json

import numpy as np
import pytest

from deepseek_jax.config import RebalanceConfig
from deepseek_jax.dense_config import TINY_DENSE
from deepseek_jax.io.placement import read_placement, write_placement
from deepseek_jax.parallel.eplb import rebalance_experts
from deepseek_jax.presets import TINY

LAYERS, EXPERTS = 4, 16  # three of the model, one of MTP
SETTINGS = RebalanceConfig(redundant_experts=8, nodes=2, gpus=8)


@pytest.fixture
def written(tmp_path):
  loads = np.random.default_rng(0).integers(0, 1000, (LAYERS, EXPERTS))
  placement = rebalance_experts(loads, EXPERTS + 8, 4, 2, 8)
  path = tmp_path / "new" / "placement.json"
  write_placement(path, placement, loads, SETTINGS, "runs/x/checkpoints/3")
  return path, placement, loads


def test_what_was_written_is_read(written):
  path, placement, loads = written
  found = read_placement(path, TINY, gpus=8)
  np.testing.assert_array_equal(found.expert_LR, placement.expert_LR)
  np.testing.assert_array_equal(found.copies_LE, placement.copies_LE)
  # The same places of each expert; copies are numbered by place.
  np.testing.assert_array_equal(
    np.sort(found.places_LEX, -1), np.sort(placement.places_LEX, -1)
  )
  values = json.loads(path.read_text())
  assert values["loads"] == loads.tolist()
  assert values["measured"] == "runs/x/checkpoints/3"
  assert (values["nodes"], values["gpus"]) == (2, 8)
  assert [file.name for file in path.parent.iterdir()] == ["placement.json"]


def test_another_model_or_mesh(written):
  path, _, _ = written
  for config, has in (
    (dataclasses.replace(TINY, n_layers=6), "6 of 16"),
    (dataclasses.replace(TINY, n_routed_experts=32), "4 of 32"),
    (TINY_DENSE, "0 of 0"),
  ):
    says = f"is for 4 layers of 16 routed experts, but the model has {has}"
    with pytest.raises(ValueError, match=says):
      read_placement(path, config, gpus=8)
  with pytest.raises(ValueError, match=r"is for 8 GPUs, but the mesh splits .* over 4"):
    read_placement(path, TINY, gpus=4)
  with pytest.raises(FileNotFoundError, match=r"generate\.placement=.*absent\.json"):
    read_placement(path.with_name("absent.json"), TINY, gpus=8)


def damage(values: dict, kind: str) -> object:
  """What becomes of a file's values."""
  if kind == "an expert without a place":
    row = values["experts"][1]
    values["experts"][1] = [e if e != 5 else 6 for e in row]
  elif kind == "an expert that does not exist":
    values["experts"][0][0] = EXPERTS
  elif kind == "a row too short":
    values["experts"][2].pop()
  elif kind == "no numbers":
    values["experts"] = "all"
  elif kind == "uneven":
    values["gpus"] = 7
  elif kind == "another key":
    values["places"] = values.pop("experts")
  elif kind == "a list":
    return list(values)
  return values


KINDS = (
  "an expert without a place",
  "an expert that does not exist",
  "a row too short",
  "no numbers",
  "uneven",
  "another key",
  "a list",
  "cut off",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_one_line(written, kind):
  path, _, _ = written
  text = json.dumps(damage(json.loads(path.read_text()), kind))
  path.write_text(text[:-20] if kind == "cut off" else text)
  with pytest.raises(ValueError, match=r"generate\.placement=.* is no placement") as e:
    read_placement(path, TINY, gpus=8)
  assert "\n" not in str(e.value)
