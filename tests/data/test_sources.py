"""Every format, order and limit of `Documents`, and what bad input says."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from deepseek_jax.data.sources import Documents

TEXTS = ["one\r\nline", "zwei\n\n  Zeilen", "三 \u00e9\u00df \U0001f600"]
JSONL = "".join(json.dumps({"text": t, "n": 1}) + "\n" for t in TEXTS).encode()


def write_array_record(path, records: list[bytes]) -> None:
  writer = ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()


def write(path, data: bytes):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)
  return path


FORMATS = {
  "a.jsonl": lambda p: p.write_bytes(JSONL + b"\n\n"),
  "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(JSONL)),
  # Two frames: what a parallel compressor or `cat a.zst b.zst` makes.
  "a.jsonl.zst": lambda p: p.write_bytes(
    zstandard.compress(JSONL[:30]) + zstandard.compress(JSONL[30:])
  ),
  "a.parquet": lambda p: pq.write_table(pa.table({"n": [1, 2, 3], "text": TEXTS}), p),
  "a.array_record": lambda p: write_array_record(p, [t.encode() for t in TEXTS]),
  "a.arrayrecord": lambda p: write_array_record(
    p, [json.dumps({"text": t}).encode() for t in TEXTS]
  ),
  "a.array_record-00000-of-00001": lambda p: write_array_record(
    p, [t.encode() for t in TEXTS]
  ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_every_format(tmp_path, name):
  FORMATS[name](tmp_path / name)
  assert list(Documents(str(tmp_path / name))) == TEXTS
  assert list(Documents(str(tmp_path))) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a.txt.gz", "a.md.zst"])
def test_a_text_file_is_one_document_byte_for_byte(tmp_path, name):
  data = b"x = 1\r\n\ty\n"
  if name.endswith(".gz"):
    data = gzip.compress(data)
  if name.endswith(".zst"):
    data = zstandard.compress(data)
  assert list(Documents(str(write(tmp_path / name, data)))) == ["x = 1\r\n\ty\n"]


def test_folders_are_read_recursively_in_stable_order(tmp_path):
  for name in ("b.txt", "a/z.txt", "a/c/d.txt", "c.md"):
    write(tmp_path / name, name.encode())
  write(tmp_path / ".git/config.txt", b"hidden")
  write(tmp_path / "picture.png", b"\x89PNG")
  write(tmp_path / "latin.txt", "é".encode("latin-1"))
  write(tmp_path / "empty.txt", b"")
  documents = Documents(str(tmp_path))
  expected = ["b.txt", "c.md", "a/z.txt", "a/c/d.txt"]
  assert list(documents) == expected
  assert list(documents) == expected  # and again
  assert documents.undecodable == 1


def test_globs(tmp_path):
  for name in ("a.txt", "b.txt", "c.md", "d/e.txt"):
    write(tmp_path / name, name.encode())
  assert list(Documents(f"{tmp_path}/*.txt")) == ["a.txt", "b.txt"]
  assert list(Documents(f"{tmp_path}/**/*.txt")) == ["a.txt", "b.txt", "d/e.txt"]
  assert list(Documents(f"{tmp_path}/*")) == ["a.txt", "b.txt", "c.md", "d/e.txt"]


def test_max_bytes_counts_utf8_and_cuts_the_last_text(tmp_path):
  write(tmp_path / "a.txt", b"12345")
  write(tmp_path / "b.txt", "ééé".encode())
  write(tmp_path / "c.txt", b"never")
  assert list(Documents(str(tmp_path), max_bytes=8)) == ["12345", "é"]
  assert list(Documents(str(tmp_path), max_bytes=5)) == ["12345"]


def test_text_key_and_lone_surrogates(tmp_path):
  path = write(tmp_path / "a.jsonl", b'{"body": "a\\ud800b", "text": 3}\n')
  assert list(Documents(str(path), text_key="body")) == ["a\ufffdb"]


def test_the_default_is_the_standard_library(tmp_path):
  documents = Documents(max_bytes=300_000)
  texts = list(documents)
  assert sum(len(text.encode()) for text in texts) <= 300_000
  assert len(texts) > 3
  names = [file.relative_to(documents.root).as_posix() for file in documents.files]
  assert names[0] == "__future__.py"
  assert "json/decoder.py" in names
  assert not any("site-packages" in name for name in names)
  assert documents.identity() == Documents(max_bytes=300_000).identity()


def test_identity_follows_the_files(tmp_path):
  path = write(tmp_path / "a.txt", b"one")
  before = Documents(str(tmp_path)).identity()
  assert json.loads(json.dumps(before)) == before
  path.write_bytes(b"two!")
  assert Documents(str(tmp_path)).identity() != before


def damaged_gzip(path):
  path.write_bytes(gzip.compress(JSONL * 100)[:-20])


def damaged_zstd(path):
  path.write_bytes(zstandard.compress(JSONL * 100)[:-3])


def damaged_parquet(path):
  FORMATS["a.parquet"](path)
  path.write_bytes(path.read_bytes()[:-9])


BAD_FILES = {
  "not_json.jsonl": (b'{"text": "x"}\n{"text"\n', r"not_json.jsonl, line 2: not JSON"),
  "utf8.jsonl": (b'{"text": "\xff"}\n', r"utf8.jsonl, line 1: not JSON"),
  "list.jsonl": (b"[1]\n", r"list.jsonl, line 1: list instead of an object"),
  "key.jsonl": (
    b'{"text": "x"}\n{"body": "x", "n": 1}\n',
    r"key.jsonl, line 2: no field 'text' among body, n: set data.text_key",
  ),
  "null.jsonl": (b'{"text": null}\n', r"line 1: field 'text' is NoneType, not a text"),
  "a.jsonl.gz": (b"no gzip", r"a.jsonl.gz: damaged: "),
  "cut.jsonl.gz": (damaged_gzip, r"cut.jsonl.gz: damaged: "),
  "a.jsonl.zst": (b"no zstd at all", r"a.jsonl.zst: damaged: "),
  "cut.jsonl.zst": (damaged_zstd, r"damaged: the last zstd frame is cut short"),
  "cut.parquet": (damaged_parquet, r"cut.parquet: damaged: "),
  "key.parquet": (
    lambda p: pq.write_table(pa.table({"body": ["x"]}), p),
    r"key.parquet: no column 'text' among body: set data.text_key",
  ),
  "null.parquet": (
    lambda p: pq.write_table(pa.table({"text": ["x", None]}), p),
    r"null.parquet, row 1: field 'text' is NoneType, not a text",
  ),
  "bad.array_record": (b"nothing of the kind", r"bad.array_record: damaged: "),
  "key.array_record": (
    lambda p: write_array_record(p, [b'{"body": "x"}']),
    r"key.array_record, record 0: no field 'text' among body: set data.text_key",
  ),
  "latin.txt": ("é".encode("latin-1"), r"latin.txt: not UTF-8 text"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(tmp_path, name):
  content, message = BAD_FILES[name]
  path = tmp_path / name
  content(path) if callable(content) else path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as caught:
    list(Documents(str(path)))
  assert str(path) in str(caught.value)
  assert "\n" not in str(caught.value)


def test_bad_paths(tmp_path):
  write(tmp_path / "folder/picture.png", b"x")
  write(tmp_path / "a.bin", b"x")
  for path, kind, message in (
    ("gone", FileNotFoundError, "data.path='{}' does not exist"),
    ("*.txt", FileNotFoundError, "data.path='{}' matches no file"),
    ("folder", ValueError, "data.path='{}' has no file of a known kind among 1: use"),
    ("a.bin", ValueError, "data.path='{}' is of no known kind: use text"),
  ):
    path = f"{tmp_path}/{path}"
    with pytest.raises(kind, match=re.escape(message.format(path))):
      Documents(path)
