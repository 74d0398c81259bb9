"""Checkpoints of a run: asynchronous, atomic, keep-N, checked when read (Orbax).

One checkpoint `DIRECTORY/STEP/` has three items: `state`, a nested plain dict of
arrays whose keys are parameter paths (no module types and no mesh, so any mesh can
read it); `loop`, JSON with the counters and the data iterator's position; and `ema`,
when a moving average of the weights is kept.

Orbax writes into a temporary folder and renames it when everything is there, so a
run killed at any moment leaves whole checkpoints only. Orbax does not notice bits
that flip later inside array data; therefore the writing thread adds, before that
rename, `manifest.json` with the size and CRC-32 of every file, and reading compares.
A checkpoint without a manifest (copied by another tool, say) is used if Orbax can
read it, with a warning.

Left out: remote file systems; process 0 alone computes and compares the checksums.
"""

import json
import logging
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

log = logging.getLogger("deepseek_jax")

MANIFEST = "manifest.json"
ITEMS = ("state", "loop", "ema")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Restored:
  """What one checkpoint held, arrays placed as the abstract tree asked."""

  step: int
  state: dict[str, Any]
  loop: dict[str, Any]
  ema: dict[str, Any] | None


class Checkpoints:
  """The checkpoints in one directory, for a run that reads and writes them.

  Opening removes what an interrupted save left half written. Checkpoints found
  damaged by `restore` are renamed to `damaged-STEP` by the first `save` after it, so
  that they neither count as kept nor block the step they claim.
  """

  def __init__(self, directory: str | Path, keep: int, asynchronous: bool = True):
    self.directory = Path(directory).absolute()
    self._asynchronous = asynchronous
    self._damaged: list[int] = []
    self._saving = -1
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      cleanup_tmp_directories=True,
      save_root_metadata=False,
      lightweight_initialize=True,
      # Called in the writing thread, on process 0, before the atomic rename.
      async_options=ocp.AsyncOptions(
        post_finalization_callback=lambda: write_manifest(
          _unfinished(self.directory, self._saving)
        )
      ),
    )
    self._orbax = ocp.CheckpointManager(
      self.directory, options=options, item_names=ITEMS
    )

  def save(
    self,
    step: int,
    state: dict[str, Any],
    loop: dict[str, Any],
    ema: dict[str, Any] | None = None,
  ) -> None:
    """Copies the arrays to the host and writes them in a thread; see `wait`.

    All processes call it. A step that this run has saved already is left alone.

    Raises:
      Errors of an earlier asynchronous save (a full disk, say) surface here.
    """
    self._set_damaged_aside()
    if step in self._orbax.all_steps():
      return
    self.wait()
    self._saving = step
    items = {"state": ocp.args.PyTreeSave(state), "loop": ocp.args.JsonSave(loop)}
    if ema is not None:
      items["ema"] = ocp.args.PyTreeSave(ema)
    self._orbax.save(step, args=ocp.args.Composite(**items))
    if not self._asynchronous:
      self.wait()

  def restore(
    self, abstract: dict[str, Any], abstract_ema: dict[str, Any] | None = None
  ) -> Restored | None:
    """The newest whole checkpoint, or None where there is none at all.

    Args:
      abstract: `jax.ShapeDtypeStruct`s with shardings, in the form of the state; a
        subtree of it restores that part alone.
      abstract_ema: the same for the moving average, or None to leave it out.

    Raises:
      ValueError: there are checkpoints, and every one is damaged.
    """
    self.wait()
    found, self._damaged = _restore_newest(
      self._orbax, self.directory, abstract, abstract_ema
    )
    return found

  def wait(self) -> None:
    """Blocks until the save under way is on disk, and raises its error if any."""
    self._orbax.wait_until_finished()

  def close(self) -> None:
    self._orbax.close()

  def _set_damaged_aside(self) -> None:
    if not self._damaged:
      return
    if jax.process_index() == 0:
      for step in self._damaged:
        aside = self.directory / f"damaged-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        (self.directory / str(step)).rename(aside)
        log.warning("damaged checkpoint %d was moved to %s", step, aside)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("damaged checkpoints set aside")
    self._damaged = []
    self._orbax.reload()


def restore_newest(
  directory: str | Path,
  abstract: dict[str, Any],
  abstract_ema: dict[str, Any] | None = None,
) -> Restored | None:
  """As `Checkpoints.restore`, for readers: nothing in `directory` is changed."""
  directory = Path(directory).absolute()
  options = ocp.CheckpointManagerOptions(
    read_only=True,
    save_interval_steps=0,
    create=False,
    save_root_metadata=False,
    lightweight_initialize=True,
  )
  if not directory.is_dir():
    return None
  with ocp.CheckpointManager(directory, options=options, item_names=ITEMS) as orbax:
    return _restore_newest(orbax, directory, abstract, abstract_ema)[0]


def _restore_newest(
  orbax: ocp.CheckpointManager,
  directory: Path,
  abstract: dict[str, Any],
  abstract_ema: dict[str, Any] | None,
) -> tuple[Restored | None, list[int]]:
  """The newest checkpoint that is whole, and the damaged steps passed over."""
  faults: dict[int, str] = {}
  for step in sorted(orbax.all_steps(), reverse=True):
    fault = find_fault(directory / str(step)) if jax.process_index() == 0 else None
    restored = None
    if _all_processes(fault is None):
      try:
        restored = _read(orbax, step, abstract, abstract_ema)
      except Exception as error:  # whatever Orbax raises, the file is not readable
        fault = f"{type(error).__name__}: {_first_line(error)}"
    if _all_processes(restored is not None):
      return restored, list(faults)
    faults[step] = fault or "another process could not read it"
    log.warning(
      "checkpoint %s is damaged and skipped: %s", directory / str(step), faults[step]
    )
  if faults:
    reasons = "; ".join(f"{step}: {reason}" for step, reason in faults.items())
    raise ValueError(
      f"none of the {len(faults)} checkpoints in {directory} can be read ({reasons}): "
      "repair them, or move the folder away to start from the beginning"
    )
  return None, []


def _read(
  orbax: ocp.CheckpointManager,
  step: int,
  abstract: dict[str, Any],
  abstract_ema: dict[str, Any] | None,
) -> Restored:
  items = {"state": _pytree_restore(abstract), "loop": ocp.args.JsonRestore()}
  if abstract_ema is not None:
    items["ema"] = _pytree_restore(abstract_ema)
  found: Any = orbax.restore(step, args=ocp.args.Composite(**items))
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    (found.state, found.get("ema"))
  ):
    if isinstance(leaf, jax.ShapeDtypeStruct):
      raise ValueError(f"it has no array {jax.tree_util.keystr(path[1:])}")
  return Restored(step, found.state, found.loop, found.get("ema"))


def _pytree_restore(abstract: dict[str, Any]) -> Any:
  return ocp.args.PyTreeRestore(
    item=abstract,
    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
    partial_restore=True,
  )


def write_manifest(folder: Path) -> None:
  """Writes sizes and CRC-32s of all files of the items below `folder`."""
  files = {
    str(path.relative_to(folder)): [path.stat().st_size, _crc(path)]
    for item in ITEMS
    for path in sorted((folder / item).rglob("*"))
    if path.is_file()
  }
  temporary = folder / (MANIFEST + ".part")
  temporary.write_text(json.dumps(files, indent=0))
  temporary.rename(folder / MANIFEST)


def find_fault(folder: Path) -> str | None:
  """What is wrong with the files of a checkpoint; None when all is as written."""
  try:
    files = json.loads((folder / MANIFEST).read_text())
    for name, (size, crc) in files.items():
      path = folder / name
      if not path.is_file():
        return f"{name} is missing"
      if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes instead of {size}"
      if _crc(path) != crc:
        return f"{name} has changed since it was written (CRC differs)"
  except FileNotFoundError:
    log.warning("checkpoint %s has no %s: its content is not checked", folder, MANIFEST)
  except (ValueError, TypeError, AttributeError) as error:
    return f"{MANIFEST} is unreadable ({_first_line(error)})"
  return None


def check_space(directory: Path, checkpoint_bytes: int, keep: int) -> None:
  """Refuses a run whose checkpoints would not fit on the disk.

  `keep` checkpoints stand there and one more while it is written; what the directory
  holds already counts as room.

  Raises:
    ValueError: too little space.
  """
  needed = (keep + 1) * checkpoint_bytes
  held = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
  existing = next(path for path in (directory, *directory.parents) if path.exists())
  free = shutil.disk_usage(existing).free + held
  if free < needed:
    raise ValueError(
      f"{directory} has room for {free / 1e9:,.1f} GB, but {keep + 1} checkpoints of "
      f"{checkpoint_bytes / 1e9:,.1f} GB (checkpoint.keep={keep} and the one being "
      f"written) need {needed / 1e9:,.1f} GB: free space, use another workdir, or "
      "lower checkpoint.keep"
    )


def tree_bytes(tree: Any) -> int:
  """Bytes of all arrays (or `jax.ShapeDtypeStruct`s) of a tree, over all devices."""
  return sum(
    int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _crc(path: Path) -> int:
  crc = 0
  with path.open("rb") as file:
    while chunk := file.read(_CHUNK):
      crc = zlib.crc32(chunk, crc)
  return crc


def _unfinished(directory: Path, step: int) -> Path:
  """Where Orbax is writing `step`, before it renames the folder."""
  temporary = list(directory.glob(f"{step}.orbax-checkpoint-tmp*"))
  return temporary[0] if temporary else directory / str(step)


def _all_processes(ok: bool) -> bool:
  if jax.process_count() == 1:
    return ok
  return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def _first_line(error: Exception) -> str:
  lines = [line for line in str(error).splitlines() if line.strip()]
  return lines[0].strip() if lines else "no message"
