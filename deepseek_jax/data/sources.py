"""Documents: the files named by `data.path`, read one text at a time.

Without a path the documents are the standard library's own sources (tests
included, site-packages not): tens of megabytes of real code on every machine. With
one: text files (a document each), JSONL (plain, .gz, .zst), Parquet and ArrayRecord
(a document per row), in any mixture, as a file, a folder (recursively, hidden names
left out) or a glob. The order is that of the sorted paths, on every machine.

Files that the user did not name one by one may be unreadable as text: in a folder or
glob, files of other kinds and texts that are not UTF-8 are skipped and counted. All
other damage is a ValueError that names the file and, where there is one, the line or
row.
"""

import contextlib
import glob
import gzip
import io
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

_TEXT = re.compile(
  r"\.(txt|text|md|rst|tex|org|py|pyi|pyx|ipynb|c|h|cc|cpp|cxx|hpp|cu|cuh|java|kt|scala|"
  r"go|rs|js|jsx|ts|tsx|rb|php|pl|lua|r|jl|hs|ml|el|lisp|swift|cs|sh|bash|sql|html?|"
  r"css|xml|ya?ml|toml|ini|cfg|csv|tsv|cmake|proto|s|asm|f90|v|sv|vhd)$",
  re.IGNORECASE,
)
_JSONL = re.compile(r"\.(jsonl|ndjson|jsonlines)$", re.IGNORECASE)
_PARQUET = re.compile(r"\.(parquet|pq)$", re.IGNORECASE)
_ARRAY_RECORD = re.compile(r"\.array_?record(-\d+-of-\d+)?$", re.IGNORECASE)
_PACKED = re.compile(r"\.(gz|zst)$", re.IGNORECASE)
_KINDS = (
  "text (.txt, .md, .py, ...), .jsonl, either of them .gz or .zst, .parquet, "
  ".array_record"
)
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}


class Documents:
  """The texts under `path`; iterate as often as you like, in the same order.

  Attributes:
    files: the files to read, sorted.
    n_bytes: their size on disk.
    undecodable: how many texts were skipped, as of the last iteration's progress.

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: nothing there is of a kind that can be read.
  """

  def __init__(self, path: str = "", text_key: str = "text", max_bytes: int = 0):
    self.path, self.text_key, self.max_bytes = path, text_key, max_bytes
    if path:
      self.root, self.files = _find(path)
    else:
      self.root = Path(sysconfig.get_path("stdlib"))
      self.files = [f for f in _walk(self.root, _NOT_LIBRARY) if f.suffix == ".py"]
      if not self.files:
        raise FileNotFoundError(
          f"this interpreter has no library sources in {self.root}: set data.path"
        )
    self.n_bytes = sum(file.stat().st_size for file in self.files)
    self.undecodable = 0

  def identity(self) -> dict[str, Any]:
    """What the texts depend on, without reading them; plain JSON values."""
    stats = [(file, file.stat()) for file in self.files]
    return {
      "files": [
        [os.path.relpath(file, self.root), stat.st_size, stat.st_mtime_ns]
        for file, stat in stats
      ],
      "text_key": self.text_key,
      "max_bytes": self.max_bytes,
    }

  def __iter__(self) -> Iterator[str]:
    """Yields every text that is not empty, up to `max_bytes` of UTF-8 in all."""
    left = self.max_bytes or float("inf")
    self.undecodable = 0
    for file in self.files:
      for text in self._read(file):
        data = text.encode("utf-8", "surrogatepass")
        if len(data) > left:
          text = data[: int(left)].decode("utf-8", "ignore")
        left -= len(data)
        if text:
          yield _without_surrogates(text)
        if left <= 0:
          return

  def _read(self, file: Path) -> Iterator[str]:
    name = _PACKED.sub("", file.name)
    if _JSONL.search(name):
      yield from _read_jsonl(file, self.text_key)
    elif _PARQUET.search(name):
      yield from _read_parquet(file, self.text_key)
    elif _ARRAY_RECORD.search(name):
      yield from _read_array_record(file, self.text_key)
    else:
      with _damage(file), _open(file) as stream:
        data = stream.read()
      try:
        yield data.decode("utf-8")
      except UnicodeDecodeError as error:
        if file == self.root:
          raise ValueError(f"{file}: not UTF-8 text: {error}") from None
        self.undecodable += 1


def _find(path: str) -> tuple[Path, list[Path]]:
  """The root that names are relative to, and the files of a path or glob."""
  root = Path(path).expanduser()
  if root.is_file():
    if not _is_readable(root):
      raise ValueError(f"data.path={path!r} is of no known kind: use {_KINDS}")
    return root, [root]
  if root.is_dir():
    found = list(_walk(root))
  elif glob.has_magic(path):
    matches = sorted(Path(m) for m in glob.glob(str(root), recursive=True))
    # A pattern may match a folder and, with **, also the files in it.
    nested = [list(_walk(m)) if m.is_dir() else [m] for m in matches]
    found = sorted({file for files in nested for file in files})
    if not found:
      raise FileNotFoundError(f"data.path={path!r} matches no file")
    root = Path(os.path.commonpath([file.parent for file in found]))
  else:
    raise FileNotFoundError(f"data.path={path!r} does not exist")
  files = [file for file in found if _is_readable(file)]
  if not files:
    raise ValueError(
      f"data.path={path!r} has no file of a known kind among {len(found)}: use {_KINDS}"
    )
  return root, files


def _walk(root: Path, leave_out: set[str] = frozenset()) -> Iterator[Path]:  # pyright: ignore[reportArgumentType]
  """Files below `root`, sorted by name within each folder; hidden ones left out."""
  for folder, folders, names in os.walk(root):
    folders[:] = sorted(f for f in folders if f[0] != "." and f not in leave_out)
    yield from (Path(folder, name) for name in sorted(names) if name[0] != ".")


def _is_readable(file: Path) -> bool:
  if _PARQUET.search(file.name) or _ARRAY_RECORD.search(file.name):
    return True
  name = _PACKED.sub("", file.name)
  return bool(_JSONL.search(name) or _TEXT.search(name))


def _without_surrogates(text: str) -> str:
  """Replaces the lone surrogates that JSON can express and UTF-8 cannot."""
  try:
    text.encode("utf-8")
    return text
  except UnicodeEncodeError:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@contextlib.contextmanager
def _damage(file: Path, *kinds: type[Exception]) -> Iterator[None]:
  """Turns what the decompressors and readers raise into one line."""
  kinds = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError, *kinds)
  try:
    yield
  except kinds as error:
    reason = " ".join(str(error).split())
    raise ValueError(f"{file}: damaged: {reason}") from error


class _ZstdStream(io.RawIOBase):
  """Decompressed bytes of all frames; unlike zstandard's own, knows truncation."""

  def __init__(self, file: Path):
    self._file = open(file, "rb")  # noqa: SIM115
    self._frame = None
    self._input = self._output = b""

  def readable(self) -> bool:
    return True

  def close(self) -> None:
    self._file.close()
    super().close()

  def readinto(self, buffer: Any) -> int:
    while not self._output:
      self._input = self._input or self._file.read(1 << 17)
      if not self._input:
        if self._frame is not None:
          raise EOFError("the last zstd frame is cut short")
        return 0
      if self._frame is None:
        self._frame = zstandard.ZstdDecompressor().decompressobj()
      self._output = self._frame.decompress(self._input)
      self._input = b""
      if self._frame.eof:
        self._input, self._frame = self._frame.unused_data, None
    n = min(len(buffer), len(self._output))
    buffer[:n], self._output = self._output[:n], self._output[n:]
    return n


def _open(file: Path) -> BinaryIO:
  suffix = file.suffix.lower()
  if suffix == ".gz":
    return gzip.open(file, "rb")  # pyright: ignore[reportReturnType]
  if suffix == ".zst":
    return io.BufferedReader(_ZstdStream(file), 1 << 17)
  return open(file, "rb")


def _field(value: Any, text_key: str, place: str) -> str:
  """The text of one JSON object; `place` says where it stands."""
  if not isinstance(value, dict):
    raise ValueError(f"{place}: {type(value).__name__} instead of an object")
  if text_key not in value:
    raise ValueError(
      f"{place}: no field {text_key!r} among {', '.join(value) or 'none'}: set "
      "data.text_key"
    )
  return _checked_text(value[text_key], text_key, place)


def _checked_text(value: Any, text_key: str, place: str) -> str:
  if not isinstance(value, str):
    raise ValueError(
      f"{place}: field {text_key!r} is {type(value).__name__}, not a text"
    )
  return value


def _read_jsonl(file: Path, text_key: str) -> Iterator[str]:
  with _damage(file), _open(file) as stream:
    for number, line in enumerate(stream, 1):
      if not line.strip():
        continue
      try:
        value = json.loads(line)
      except ValueError as error:  # also a UnicodeDecodeError
        raise ValueError(f"{file}, line {number}: not JSON: {error}") from None
      yield _field(value, text_key, f"{file}, line {number}")


def _read_parquet(file: Path, text_key: str) -> Iterator[str]:
  import pyarrow
  import pyarrow.parquet

  with open(file, "rb") as stream, _damage(file, pyarrow.ArrowException, OSError):
    table = pyarrow.parquet.ParquetFile(stream)
    columns = table.schema_arrow.names
    if text_key not in columns:
      raise ValueError(
        f"{file}: no column {text_key!r} among {', '.join(columns)}: set data.text_key"
      )
    row = 0
    for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
      for value in batch.column(0).to_pylist():
        yield _checked_text(value, text_key, f"{file}, row {row}")
        row += 1


def _read_array_record(file: Path, text_key: str) -> Iterator[str]:
  """Records are UTF-8 text, or JSON objects with the field `text_key`."""
  from array_record.python import array_record_module  # pyright: ignore

  with _damage(file, ValueError, RuntimeError, IndexError):
    reader = array_record_module.ArrayRecordReader(
      str(file), options="readahead_buffer_size:0"
    )
    n_records = reader.num_records()
  try:
    for start in range(0, n_records, 1024):
      with _damage(file, ValueError, RuntimeError, IndexError):
        records = reader.read(start, min(start + 1024, n_records))
      for row, record in enumerate(records, start):
        yield _record_text(record, text_key, f"{file}, record {row}")
  finally:
    with _damage(file, ValueError, RuntimeError):
      reader.close()  # may be the first to say that the file is no ArrayRecord


def _record_text(record: bytes, text_key: str, place: str) -> str:
  try:
    text = record.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{place}: not UTF-8 text: {error}") from None
  if text.lstrip().startswith("{"):
    try:
      return _field(json.loads(text), text_key, place)
    except json.JSONDecodeError:
      pass  # a text that only looks like an object
  return text
