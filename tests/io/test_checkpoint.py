"""Checkpoints: what goes in comes out, damage is found, nothing good is lost."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.io.checkpoint import (
  MANIFEST,
  Checkpoints,
  check_space,
  restore_newest,
)
from deepseek_jax.mesh import make_mesh

ROOT = Path(__file__).resolve().parents[2]


def _mesh(n: int):
  return make_mesh(data=n, devices=jax.devices()[:n])


SPLIT, WHOLE, ELSEWHERE = P("data"), P(), P(None, "data")


def _state(seed: int, mesh, spec=SPLIT):
  key = jax.random.key(seed)

  def place(x, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))

  wide = jax.random.normal(key, (8, 64, 16))
  return {
    "step": place(jnp.int32(seed), WHOLE),
    "params": {
      "blocks.attn.wq": place(wide, spec),
      "blocks.ffn.w2": place(jax.random.normal(key, (16, 5)), spec),
    },
    "mu": {"blocks.attn.wq": place(wide.astype(jnp.bfloat16), ELSEWHERE)},
  }


def _abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def _assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def _save(directory: Path, *steps: int, keep: int = 3) -> dict:
  checkpoints = Checkpoints(directory, keep)
  for step in steps:
    state = _state(step, _mesh(1))
    checkpoints.save(step, state, {"progress": {"step": step}})
  checkpoints.close()
  return _abstract(state)


def _largest(directory: Path, step: int) -> Path:
  files = (directory / str(step) / "state").rglob("*")
  return max(files, key=lambda path: path.stat().st_size if path.is_file() else 0)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip_is_exact(tmp_path, asynchronous):
  state, ema = _state(3, _mesh(1)), {"w": jnp.arange(7.0)}
  loop = {"progress": {"step": 3, "tokens": 12}, "data": {"next_index": 4}}
  checkpoints = Checkpoints(tmp_path, keep=2, asynchronous=asynchronous)
  checkpoints.save(3, state, loop, ema)
  found = checkpoints.restore(_abstract(state), _abstract(ema))
  checkpoints.close()
  assert found.step == 3
  assert found.loop == loop
  _assert_equal(found.state, state)
  _assert_equal(found.ema, ema)


def test_another_mesh_and_a_part(tmp_path):
  if len(jax.devices()) < 8:
    pytest.skip("needs eight devices")
  state = _state(3, _mesh(8))
  checkpoints = Checkpoints(tmp_path, keep=2)
  checkpoints.save(3, state, {})
  checkpoints.close()
  for mesh, spec in ((_mesh(1), SPLIT), (_mesh(2), WHOLE), (_mesh(4), SPLIT)):
    found = restore_newest(tmp_path, _abstract(_state(0, mesh, spec))).state
    _assert_equal(found, state)
    assert found["params"]["blocks.attn.wq"].sharding == NamedSharding(mesh, spec)
  part = {"params": {"blocks.ffn.w2": _abstract(state)["params"]["blocks.ffn.w2"]}}
  found = restore_newest(tmp_path, part).state
  _assert_equal(found, {"params": {"blocks.ffn.w2": state["params"]["blocks.ffn.w2"]}})


def test_keeps_the_newest(tmp_path):
  _save(tmp_path, 1, 2, 3, 4, keep=2)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_saving_a_step_twice_is_nothing(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=2)
  state = _state(1, _mesh(1))
  checkpoints.save(1, state, {"a": 1})
  checkpoints.save(1, state, {"a": 2})
  assert checkpoints.restore(_abstract(state)).loop == {"a": 1}
  checkpoints.close()


def test_no_checkpoint_is_none(tmp_path):
  abstract = _abstract(_state(1, _mesh(1)))
  assert restore_newest(tmp_path / "absent", abstract) is None
  assert restore_newest(tmp_path, abstract) is None
  assert list(tmp_path.iterdir()) == []


def _flip(path: Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0x10
  path.write_bytes(bytes(data))


DAMAGE = {
  "flipped bit in array data": lambda step: _flip(
    _largest(step.parent, int(step.name))
  ),
  "truncated": lambda step: os.truncate(_largest(step.parent, int(step.name)), 100),
  "file missing": lambda step: _largest(step.parent, int(step.name)).unlink(),
  "loop state broken": lambda step: (step / "loop" / "metadata").write_text("{"),
  "manifest broken": lambda step: (step / MANIFEST).write_text("{"),
  "manifest of another form": lambda step: (step / MANIFEST).write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_skipped(tmp_path, damage, caplog):
  abstract = _save(tmp_path, 1, 2)
  damage(tmp_path / "2")
  with caplog.at_level(logging.WARNING, "deepseek_jax"):
    found = restore_newest(tmp_path, abstract)
  assert found.step == 1
  _assert_equal(found.state, _state(1, _mesh(1)))
  assert f"{tmp_path / '2'} is damaged" in caplog.text


@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "commit_success.txt", "data"])
def test_damage_that_only_orbax_can_find(tmp_path, file, caplog):
  """Without a manifest, or in the few files that it does not cover."""
  abstract = _save(tmp_path, 1, 2)
  if file == "data":
    (tmp_path / "2" / MANIFEST).unlink()
    _largest(tmp_path, 2).unlink()
    assert restore_newest(tmp_path, abstract).step == 1
  else:
    (tmp_path / "2" / file).write_text("{broken")
    found = restore_newest(tmp_path, abstract)
    _assert_equal(found.state, _state(found.step, _mesh(1)))


def test_checkpoint_without_manifest_is_used(tmp_path, caplog):
  abstract = _save(tmp_path, 1, 2)
  (tmp_path / "2" / MANIFEST).unlink()
  with caplog.at_level(logging.WARNING, "deepseek_jax"):
    assert restore_newest(tmp_path, abstract).step == 2
  assert f"has no {MANIFEST}" in caplog.text


def test_all_damaged_is_one_error_and_changes_nothing(tmp_path):
  abstract = _save(tmp_path, 1, 2)
  for step in ("1", "2"):
    _flip(_largest(tmp_path, int(step)))
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
  checkpoints = Checkpoints(tmp_path, keep=1)
  with pytest.raises(ValueError, match="none of the 2 checkpoints") as error:
    checkpoints.restore(abstract)
  checkpoints.close()
  assert "\n" not in str(error.value)
  assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_damaged_step_is_moved_aside_when_saved_again(tmp_path):
  abstract = _save(tmp_path, 1, 3)
  _flip(_largest(tmp_path, 3))
  checkpoints = Checkpoints(tmp_path, keep=1)
  assert checkpoints.restore(abstract).step == 1
  state = _state(2, _mesh(1))
  checkpoints.save(2, state, {})  # older than the damaged one, must survive keep=1
  checkpoints.save(3, _state(3, _mesh(1)), {})
  checkpoints.close()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "damaged-3"]
  _assert_equal(restore_newest(tmp_path, abstract).state, _state(3, _mesh(1)))


def test_another_shape_is_refused(tmp_path):
  abstract = _save(tmp_path, 1)
  leaf = abstract["params"]["blocks.ffn.w2"]
  abstract["params"]["blocks.ffn.w2"] = jax.ShapeDtypeStruct(
    (16, 6), leaf.dtype, sharding=leaf.sharding
  )
  with pytest.raises(ValueError, match="shape"):
    restore_newest(tmp_path, abstract)
  abstract["params"] = {"absent": leaf}
  with pytest.raises(ValueError, match="absent"):
    restore_newest(tmp_path, abstract)


def test_every_file_of_the_items_is_in_the_manifest(tmp_path):
  _save(tmp_path, 1)
  listed = set(json.loads((tmp_path / "1" / MANIFEST).read_text()))
  present = {
    str(path.relative_to(tmp_path / "1"))
    for item in ("state", "loop")
    for path in (tmp_path / "1" / item).rglob("*")
    if path.is_file()
  }
  assert listed == present


def test_space_is_checked_before_the_start(tmp_path):
  check_space(tmp_path / "checkpoints", 1000, keep=3)
  with pytest.raises(ValueError, match=r"checkpoint.keep=3"):
    check_space(tmp_path / "checkpoints", 10**15, keep=3)
  assert list(tmp_path.iterdir()) == []


def test_killed_while_saving_leaves_whole_checkpoints(tmp_path):
  """kill -9 at many moments of a loop that does nothing but save."""
  program = textwrap.dedent("""
    import sys, jax, jax.numpy as jnp
    from deepseek_jax.io.checkpoint import Checkpoints
    checkpoints = Checkpoints(sys.argv[1], keep=2)
    for step in range(int(sys.argv[2]), 10**6):
      state = {"w": jnp.full((64, 1024), step, jnp.float32)}
      checkpoints.save(step, state, {"step": step})
      print(step, flush=True)
  """)
  sharding = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
  abstract = {"w": jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=sharding)}
  newest = 0
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  for lines in (2, 5, 9):
    process = subprocess.Popen(
      [sys.executable, "-c", program, str(tmp_path), str(newest + 1)],
      stdout=subprocess.PIPE,
      env=environment,
      cwd=ROOT,
    )
    for _ in range(lines):
      process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = restore_newest(tmp_path, abstract)
    assert found.step > newest
    assert found.loop == {"step": found.step}
    assert (np.asarray(found.state["w"]) == found.step).all()
    newest = found.step
