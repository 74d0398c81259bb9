"""Reading safetensors files and Hugging Face folders of them, strictly.

A file is 8 bytes (little-endian length of the header), a JSON header, then data:
{"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}. Offsets
count from the end of the header, are contiguous and cover the file exactly. A folder
is `model.safetensors`, or `model.safetensors.index.json` with the file of each tensor.

Files are mapped into memory, so that opening one costs its header and reading a part
of a tensor costs that part. Written here because the safetensors library cannot give
FP8 tensors to NumPy. Everything a file says is checked before it is believed: sizes
against the file, offsets against each other, names against the index. What is wrong is
one `SafetensorsError` that names file and tensor.

Left out: types of less than a byte. A file that shrinks while it is read ends the
process, as with any memory map. The format: huggingface/safetensors, README.
"""

import json
import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

# In the order of the library's own enumeration, by which it sorts a file.
DTYPES: dict[str, np.dtype] = {
  "BOOL": np.dtype(np.bool_),
  "U8": np.dtype(np.uint8),
  "I8": np.dtype(np.int8),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
  "I16": np.dtype(np.int16),
  "U16": np.dtype(np.uint16),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I32": np.dtype(np.int32),
  "U32": np.dtype(np.uint32),
  "F32": np.dtype(np.float32),
  "C64": np.dtype(np.complex64),
  "F64": np.dtype(np.float64),
  "I64": np.dtype(np.int64),
  "U64": np.dtype(np.uint64),
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # bytes, the library's own bound
_MAX_INDEX = 1 << 30
_MAX_DIMS = 32
_MAX_SIZE = 1 << 62


class SafetensorsError(ValueError):
  """A file or folder that is not what it should be; one line."""


@dataclass(frozen=True, slots=True)
class Entry:
  """Where a tensor lies in its file."""

  name: str
  dtype: str  # a key of DTYPES
  shape: tuple[int, ...]
  start: int  # bytes from the beginning of the file
  stop: int


class SafetensorsFile:
  """One open file. Tensors are read-only views of the mapped file.

  Attributes:
    entries: every tensor by name, in the order of the header.
    metadata: the header's `__metadata__`.
    header: the header's bytes, padding included.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Maps the file and checks its header.

    Raises:
      SafetensorsError: it is not a whole, well-formed file.
      OSError: it cannot be opened.
    """
    self.path = Path(path)
    with self.path.open("rb") as file:
      size = os.fstat(file.fileno()).st_size
      self.header = _read_header(file, size, self.path)
      self.entries, self.metadata = _parse_header(self.header, size, self.path)
      self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

  def read(self, name: str) -> np.ndarray:
    """The tensor; only the parts that are looked at are read from the disk.

    Raises:
      KeyError: there is no such tensor.
    """
    entry = self.entries[name]
    dtype = DTYPES[entry.dtype]
    count = math.prod(entry.shape)
    flat = np.frombuffer(self._map, np.uint8, count * dtype.itemsize, entry.start)
    return flat.view(dtype).reshape(entry.shape)

  def will_read(self, name: str) -> None:
    """Lets the system begin to read the tensor from the disk."""
    self._advise(name, "MADV_WILLNEED")

  def release(self, name: str) -> None:
    """Gives the memory of what was read of it back; it can be read again."""
    self._advise(name, "MADV_DONTNEED")

  def _advise(self, name: str, what: str) -> None:
    entry = self.entries[name]
    start = entry.start - entry.start % mmap.PAGESIZE
    if hasattr(mmap, what) and entry.stop > entry.start:
      self._map.madvise(getattr(mmap, what), start, entry.stop - start)


class SafetensorsFolder:
  """All tensors of a Hugging Face checkpoint, whichever files they are in.

  Attributes:
    path: the folder.
    files: every open file by its name, in the order of their names.
    where: the file name of each tensor.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Opens and checks every file.

    Raises:
      FileNotFoundError: the folder is not there, or holds no checkpoint.
      SafetensorsError: a file is missing or damaged, or differs from the index.
    """
    self.path = Path(path)
    if not self.path.is_dir():
      raise FileNotFoundError(f"{self.path} is no folder: name one with a checkpoint")
    if (self.path / INDEX).exists():
      self.where = _read_index(self.path)
    elif (self.path / SINGLE).exists():
      self.where = {}
    else:
      raise FileNotFoundError(
        f"{self.path} has neither {SINGLE} nor {INDEX}: name the folder of a "
        "checkpoint in safetensors format"
      )
    self.files = dict(self._open(self.where))
    for tensor, name in self.where.items():
      if tensor not in self.files[name].entries:
        raise SafetensorsError(
          f"{self.path / name} does not hold {_show(tensor)}, which {INDEX} says"
        )

  def _open(self, listed: dict[str, str]) -> Iterator[tuple[str, SafetensorsFile]]:
    for name in sorted(set(listed.values()) or {SINGLE}):
      path = self.path / name
      if not path.is_file():
        example = next(tensor for tensor, file in listed.items() if file == name)
        raise SafetensorsError(
          f"{path} is missing: {INDEX} says that it holds {_show(example)}"
        )
      file = SafetensorsFile(path)
      if not listed:
        self.where = dict.fromkeys(file.entries, name)
      for tensor in file.entries:
        if self.where.get(tensor) != name:
          raise SafetensorsError(
            f"{path} holds {_show(tensor)}, which {INDEX} does not place there"
          )
      yield name, file

  def __contains__(self, tensor: str) -> bool:
    return tensor in self.where

  def entry(self, tensor: str) -> Entry:
    return self.files[self.where[tensor]].entries[tensor]

  def file_of(self, tensor: str) -> SafetensorsFile:
    return self.files[self.where[tensor]]

  def read(self, tensor: str) -> np.ndarray:
    """As `SafetensorsFile.read`."""
    return self.file_of(tensor).read(tensor)

  def will_read(self, tensor: str) -> None:
    self.file_of(tensor).will_read(tensor)

  def release(self, tensor: str) -> None:
    self.file_of(tensor).release(tensor)


def _read_header(file: Any, size: int, path: Path) -> bytes:
  prefix = file.read(8)
  if len(prefix) < 8:
    raise SafetensorsError(f"{path} is cut off: {size} bytes are no safetensors file")
  length = int.from_bytes(prefix, "little")
  if length > min(size - 8, MAX_HEADER):
    raise SafetensorsError(
      f"{path} says that its header has {length} bytes, but the file has {size} "
      f"(and a header at most {MAX_HEADER}): it is cut off or no safetensors file"
    )
  return file.read(length)


def _parse_header(
  header: bytes, size: int, path: Path
) -> tuple[dict[str, Entry], dict[str, str]]:
  if not header.startswith(b"{"):
    raise SafetensorsError(f"{path} has a header that is no JSON object")
  try:
    fields = _load_json(header)
  except (ValueError, RecursionError) as error:
    raise SafetensorsError(
      f"{path} has a damaged header ({_one_line(error)})"
    ) from error
  metadata = fields.pop("__metadata__", {})
  if not isinstance(metadata, dict) or not all(
    isinstance(value, str) for value in metadata.values()
  ):
    raise SafetensorsError(f"{path} has a __metadata__ that is not text by text")
  offset = 8 + len(header)
  entries = {name: _entry(name, field, offset, path) for name, field in fields.items()}
  end = offset
  for entry in sorted(entries.values(), key=lambda e: (e.start, e.stop)):
    if entry.start != end:
      kind = "overlaps another tensor" if entry.start < end else "follows a gap"
      raise SafetensorsError(
        f"{path}: {_show(entry.name)} {kind} (byte {entry.start}, expected {end})"
      )
    end = entry.stop
    if end > size:
      raise SafetensorsError(
        f"{path} is cut off: {_show(entry.name)} ends at byte {end}, the file at {size}"
      )
  if end != size:
    raise SafetensorsError(f"{path} has {size - end} bytes that belong to no tensor")
  return entries, metadata


def _entry(name: str, field: Any, offset: int, path: Path) -> Entry:
  """A checked field of the header."""
  where = f"{path}: {_show(name)}"
  if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
    raise SafetensorsError(f"{where} needs dtype, shape and data_offsets alone")
  dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
  if not isinstance(dtype, str) or dtype not in DTYPES:
    raise SafetensorsError(
      f"{where} has dtype {_show(dtype)}: known are {', '.join(DTYPES)}"
    )
  if not _are_counts(shape) or len(shape) > _MAX_DIMS:
    raise SafetensorsError(f"{where} has a shape that is none: {_show(shape)}")
  if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
    raise SafetensorsError(f"{where} has data_offsets that are none: {_show(offsets)}")
  itemsize = DTYPES[dtype].itemsize
  if math.prod(max(n, 1) for n in shape) * itemsize >= _MAX_SIZE:
    raise SafetensorsError(f"{where} has a shape too large: {_show(shape)}")
  needed, given = math.prod(shape) * itemsize, offsets[1] - offsets[0]
  if needed != given:
    raise SafetensorsError(
      f"{where} is {dtype}{list(shape)}, {needed} bytes, but data_offsets give {given}"
    )
  return Entry(name, dtype, tuple(shape), offset + offsets[0], offset + offsets[1])


def _are_counts(values: Any) -> bool:
  return isinstance(values, list) and all(
    type(value) is int and 0 <= value < _MAX_SIZE for value in values
  )


def _read_index(folder: Path) -> dict[str, str]:
  """The file of each tensor, from the folder's index."""
  path = folder / INDEX
  if path.stat().st_size > _MAX_INDEX:
    raise SafetensorsError(f"{path} is larger than {_MAX_INDEX} bytes")
  try:
    where = _load_json(path.read_bytes()).get("weight_map")
  except (ValueError, RecursionError) as error:
    raise SafetensorsError(f"{path} is damaged ({_one_line(error)})") from error
  if not isinstance(where, dict) or not where:
    raise SafetensorsError(f"{path} has no weight_map: it lists no tensors")
  for tensor, name in where.items():
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name:
      raise SafetensorsError(
        f"{path} places {_show(tensor)} in {_show(name)}, which is no file name: "
        "files must lie in the folder itself"
      )
    if "\\" in name or "\0" in name:
      raise SafetensorsError(
        f"{path} places {_show(tensor)} in {_show(name)}, which is no file name"
      )
  return where


def _load_json(text: bytes) -> dict[str, Any]:
  """A JSON object without repeated keys. Raises ValueError or RecursionError."""

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
      seen: set[str] = set()
      twice = next(n for n, _ in pairs if n in seen or seen.add(n))
      raise ValueError(f"{_show(twice)} stands there twice")
    return found

  def refuse(constant: str):
    raise ValueError(f"{constant} is no JSON")

  found = json.loads(
    text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse
  )
  if not isinstance(found, dict):
    raise ValueError("it is no JSON object")
  return found


def _show(value: Any) -> str:
  """A value of a file in a message: printable and short."""
  text = ascii(value) if not isinstance(value, str) else ascii(value)[1:-1]
  return text if len(text) <= 120 else text[:117] + "..."


def _one_line(error: BaseException) -> str:
  return ascii(" ".join(str(error).split())[:160])[1:-1] or type(error).__name__
