"""Writing Hugging Face folders of safetensors files, whole or not at all.

Tensors are fetched and written one at a time. Everything goes into `FOLDER.part`,
which takes its final name when the last byte is on the disk; whatever goes wrong
before, nothing stands under that name. The header is laid out as the safetensors
library does it: wider types first, then by name, compact JSON padded with spaces to a
multiple of 8 bytes.
"""

import errno
import json
import logging
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.io.safetensors import DTYPES, INDEX, SINGLE, SafetensorsError

log = logging.getLogger("deepseek_jax")

_THREADS = min(8, os.cpu_count() or 1)
METADATA = {"format": "pt"}  # what transformers wants to see
_RANK = {dtype: -rank for rank, dtype in enumerate(DTYPES)}


@dataclass(frozen=True, slots=True)
class Spec:
  """A tensor to be written."""

  name: str
  dtype: str  # a key of DTYPES
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    """Bytes."""
    return math.prod(self.shape) * DTYPES[self.dtype].itemsize


# The tensor of a spec: of its dtype and shape, in any memory layout.
Fetch = Callable[[Spec], np.ndarray]


def cut_into_files(
  specs: Sequence[Spec], max_bytes: int | float
) -> dict[str, list[Spec]]:
  """Names files of at most `max_bytes` (or one tensor) each, tensors in their order."""
  groups: list[list[Spec]] = [[]]
  filled = 0
  for spec in specs:
    if groups[-1] and filled + spec.size > max_bytes:
      groups.append([])
      filled = 0
    groups[-1].append(spec)
    filled += spec.size
  if len(groups) == 1:
    return {SINGLE: groups[0]}
  return {
    f"model-{i:05}-of-{len(groups):06}.safetensors": group
    for i, group in enumerate(groups, 1)
  }


def make_header(
  specs: Iterable[Spec], metadata: dict[str, str]
) -> tuple[bytes, list[Spec]]:
  """A file's header, and its tensors in the order of their data."""
  ordered = sorted(specs, key=lambda s: (_RANK[s.dtype], s.name))
  fields: dict[str, object] = {"__metadata__": metadata} if metadata else {}
  start = 0
  for spec in ordered:
    offsets = [start, start + spec.size]
    fields[spec.name] = {
      "dtype": spec.dtype,
      "shape": list(spec.shape),
      "data_offsets": offsets,
    }
    start += spec.size
  text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
  return text + b" " * (-len(text) % 8), ordered


def write_file(
  path: Path,
  header: bytes,
  specs: Sequence[Spec],
  fetch: Fetch,
  done: Callable[[int], object] = lambda _: None,
) -> None:
  """Writes one file, tensor by tensor; on an error it is left as it is.

  Args:
    fetch: called by several threads, a few tensors ahead.
    done: told the bytes of each tensor when it is written.

  Raises:
    SafetensorsError: a fetched tensor is not what its spec says, or the disk is full.
  """
  with path.open("wb") as file, _full_disk_named(path):
    file.write(len(header).to_bytes(8, "little") + header)
    for spec, tensor in _fetch_ahead(specs, fetch):
      if tensor.dtype != DTYPES[spec.dtype] or tensor.shape != spec.shape:
        raise SafetensorsError(
          f"{spec.name} should be {spec.dtype}{list(spec.shape)}, but is "
          f"{tensor.dtype}{list(tensor.shape)}"
        )
      file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
      done(spec.size)
    file.flush()
    os.fsync(file.fileno())


def _fetch_ahead(
  specs: Sequence[Spec], fetch: Fetch
) -> Iterator[tuple[Spec, np.ndarray]]:
  """Each tensor in turn, while threads work at the next ones."""
  with ThreadPoolExecutor(_THREADS, thread_name_prefix="export") as pool:
    waiting: deque[tuple[Spec, Any]] = deque()
    try:
      for spec in specs:
        waiting.append((spec, pool.submit(fetch, spec)))
        if len(waiting) > _THREADS:
          ready, job = waiting.popleft()
          yield ready, job.result()
      while waiting:
        ready, job = waiting.popleft()
        yield ready, job.result()
    finally:
      for _, job in waiting:
        job.cancel()


def write_index(folder: Path, files: dict[str, list[Spec]]) -> None:
  """The index of several files: the file of each tensor, and their bytes together."""
  where = {spec.name: name for name, group in files.items() for spec in group}
  total = sum(spec.size for group in files.values() for spec in group)
  index = {
    "metadata": {"total_size": total},
    "weight_map": dict(sorted(where.items())),
  }
  (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_folder(path: Path, needed: int):
  """Gives a temporary folder that becomes `path` if all goes well, else vanishes.

  Args:
    path: must not exist, or be an empty folder.
    needed: bytes that will be written.

  Raises:
    SafetensorsError: `path` is taken, or there is or was too little room.
  """
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise SafetensorsError(f"{path} exists already: name a folder that does not")
  part = path.with_name(path.name + ".part")
  if part.exists():
    log.warning("%s is what an interrupted export left: it is removed", part)
    shutil.rmtree(part)
  part.mkdir(parents=True)
  try:
    free = shutil.disk_usage(part).free
    if free < needed:
      raise SafetensorsError(
        f"{path} needs {needed / 1e9:,.1f} GB, but its disk has {free / 1e9:,.1f} GB "
        "free: free some space, or name a folder elsewhere"
      )
    with _full_disk_named(path):
      yield part
    os.replace(part, path)
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    raise


@contextmanager
def _full_disk_named(path: Path):
  """Turns a full disk into one line that names the file."""
  try:
    yield
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    raise SafetensorsError(
      f"the disk is full: {path} could not be written and is removed; free some space, "
      "or name a folder elsewhere"
    ) from error
