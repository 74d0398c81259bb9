"""The token cache: every document tokenised once, in one flat file.

A corpus is a folder named by a fingerprint of what its tokens depend on (files, their
sizes and times, tokenizer, reading options), with

    tokens.bin    uint16 or uint32, the texts' tokens without any special ones
    offsets.npy   int64 [documents + 1], where documents begin in tokens.bin
    sizes.npy     int64 [documents], their UTF-8 bytes
    meta.json     counts, and a checksum of each file

It is written under another name, synchronised and then renamed, so that it exists
whole or not at all. Process 0, opening it, compares the checksums (about a second a
gigabyte); what does not fit is thrown away and made again.
"""

import array
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from deepseek_jax.data.sources import Documents
from deepseek_jax.data.tokenizer import Tokenizer

log = logging.getLogger("deepseek_jax")

_VERSION = 1
_BATCH_BYTES = 4_000_000  # text tokenised in one call
_FILES = ("tokens.bin", "offsets.npy", "sizes.npy")


@dataclass(frozen=True)
class Corpus:
  """Tokens of all documents; document d has `tokens[offsets[d]:offsets[d + 1]]`."""

  tokens: np.ndarray
  offsets: np.ndarray
  sizes: np.ndarray

  def __len__(self) -> int:
    return len(self.sizes)

  @property
  def lengths(self) -> np.ndarray:
    return np.diff(self.offsets)


def load_corpus(
  documents: Documents, tokenizer: Tokenizer, folder: Path, process: int = 0
) -> Corpus:
  """Opens the corpus of these documents in `folder`, or makes it first.

  Processes that share the folder are told apart by `process`. Number 0 alone compares
  the checksums, for which it reads everything.

  Raises:
    ValueError: there is no text, or a file is damaged.
  """
  path = folder / _fingerprint(documents, tokenizer)
  if path.exists():
    reason = "" if process else _damage(path)
    if not reason:
      return _open(path)
    log.warning("%s is damaged (%s): tokenising again", path, reason)
    shutil.rmtree(path)
  # The same name each time: what a killed run left behind is removed.
  partial = path.with_name(f"{path.name}.{process}.tmp")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    _build(documents, tokenizer, partial)
    _move(partial, path)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return _open(path)


def _fingerprint(documents: Documents, tokenizer: Tokenizer) -> str:
  identity = {
    "version": _VERSION,
    "documents": documents.identity(),
    "tokenizer": tokenizer.to_json(),
  }
  return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def _build(documents: Documents, tokenizer: Tokenizer, folder: Path) -> None:
  dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
  offsets, sizes = array.array("q", [0]), array.array("q")
  progress = tqdm.tqdm(desc="tokenise", unit="B", unit_scale=True, disable=None)
  with open(folder / "tokens.bin", "wb") as stream, progress:
    for batch in _batches(documents):
      for text, ids in zip(batch, tokenizer.encode_documents(batch), strict=True):
        stream.write(ids.astype(dtype).tobytes())
        offsets.append(offsets[-1] + len(ids))
        sizes.append(len(text.encode()))
        progress.update(sizes[-1])
    if documents.undecodable:
      log.info("skipped %d files that are not UTF-8", documents.undecodable)
  if not sizes:
    raise ValueError(f"data.path={documents.path!r} has no text")
  np.save(folder / "offsets.npy", np.array(offsets, np.int64))
  np.save(folder / "sizes.npy", np.array(sizes, np.int64))
  meta = {
    "dtype": np.dtype(dtype).name,
    "documents": len(sizes),
    "tokens": offsets[-1],
    "text_bytes": sum(sizes),
    "skipped_files": documents.undecodable,
    "checksums": {name: _checksum(folder / name) for name in _FILES},
  }
  (folder / "meta.json").write_text(json.dumps(meta, indent=2))
  for name in (*_FILES, "meta.json"):
    with open(folder / name, "rb") as stream:
      os.fsync(stream.fileno())


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
  batch, size = [], 0
  for text in texts:
    batch.append(text)
    size += len(text)
    if size >= _BATCH_BYTES:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _move(partial: Path, path: Path) -> None:
  try:
    os.rename(partial, path)
  except OSError:
    # Another process of this run was faster; its corpus is the same.
    if _damage(path):
      raise


def _checksum(path: Path) -> int:
  value = 0
  with open(path, "rb") as stream:
    while block := stream.read(1 << 24):
      value = zlib.crc32(block, value)
  return value


def _meta(path: Path) -> dict[str, Any]:
  return json.loads((path / "meta.json").read_text())


def _damage(path: Path) -> str:
  """What is wrong with the corpus at `path`; empty if nothing is."""
  try:
    checksums = _meta(path)["checksums"]
    wrong = [name for name in _FILES if _checksum(path / name) != checksums[name]]
  except (OSError, ValueError, KeyError, TypeError) as error:
    return f"{type(error).__name__}: {error}"
  return f"checksum of {', '.join(wrong)}" if wrong else ""


def _open(path: Path) -> Corpus:
  meta = _meta(path)
  tokens: np.ndarray = np.zeros(0, meta["dtype"])
  if meta["tokens"]:  # an empty file cannot be mapped
    tokens = np.memmap(path / "tokens.bin", meta["dtype"], mode="r")
  return Corpus(tokens, np.load(path / "offsets.npy"), np.load(path / "sizes.npy"))
