"""Reading and writing safetensors: like the library's, and strict."""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.io import safetensors_write as writing
from deepseek_jax.io.safetensors import (
  DTYPES,
  INDEX,
  SINGLE,
  SafetensorsError,
  SafetensorsFile,
  SafetensorsFolder,
)
from deepseek_jax.io.safetensors_write import Spec, new_folder

RANDOM = np.random.default_rng(0)


def some_tensors() -> dict[str, np.ndarray]:
  """One of every type, with a scalar and an empty one."""
  tensors = {
    f"t.{name}": RANDOM.integers(0, 2, (3, 5)).astype(dtype)
    for name, dtype in DTYPES.items()
  }
  return tensors | {
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 7), ml_dtypes.bfloat16),
    "ünïcode": np.arange(4, dtype=np.int64),
  }


def specs_of(tensors: dict[str, np.ndarray]) -> list[Spec]:
  names = {dtype: name for name, dtype in DTYPES.items()}
  return [Spec(name, names[t.dtype], t.shape) for name, t in tensors.items()]


def write(path, tensors, metadata=None) -> None:
  header, ordered = writing.make_header(specs_of(tensors), metadata or {})
  writing.write_file(path, header, ordered, lambda spec: tensors[spec.name])


def raw_file(path, fields, data=b"", length=None) -> None:
  """A file whose header says `fields`, true or not."""
  header = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
  size = len(header) if length is None else length
  path.write_bytes(size.to_bytes(8, "little") + header + data)


def test_what_is_written_is_read(tmp_path):
  tensors = some_tensors()
  write(tmp_path / "a.safetensors", tensors, {"format": "pt"})
  file = SafetensorsFile(tmp_path / "a.safetensors")
  assert file.metadata == {"format": "pt"}
  assert set(file.entries) == set(tensors)
  for name, tensor in tensors.items():
    found = file.read(name)
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert found.tobytes() == tensor.tobytes()
    assert not found.flags.writeable
  file.will_read("t.F32")
  file.release("t.F32")
  np.testing.assert_array_equal(file.read("t.F32"), tensors["t.F32"])


def test_files_are_those_of_the_library(tmp_path):
  """Byte for byte."""
  library = pytest.importorskip("safetensors.numpy")
  tensors = some_tensors()
  del tensors["t.F8_E8M0"], tensors["t.C64"]  # which the library cannot write
  ours, theirs = tmp_path / "ours", tmp_path / "theirs"
  write(ours, tensors, {"format": "pt"})
  library.save_file(tensors, theirs, metadata={"format": "pt"})
  assert ours.read_bytes() == theirs.read_bytes()


def test_a_folder_of_several_files(tmp_path):
  tensors = {f"w{i}": RANDOM.random((4, i + 1), np.float32) for i in range(5)}
  files = writing.cut_into_files(specs_of(tensors), 100)
  assert [[s.name for s in group] for group in files.values()] == [
    ["w0", "w1", "w2"],  # 16 + 32 + 48 bytes
    ["w3"],
    ["w4"],
  ]
  assert next(iter(files)) == "model-00001-of-000003.safetensors"
  with new_folder(tmp_path / "out", 1000) as part:
    for name, group in files.items():
      header, ordered = writing.make_header(group, {})
      writing.write_file(part / name, header, ordered, lambda s: tensors[s.name])
    writing.write_index(part, files)
    assert not (tmp_path / "out").exists()
  folder = SafetensorsFolder(tmp_path / "out")
  assert set(folder.where) == set(tensors)
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(folder.read(name), tensor)
  index = json.loads((tmp_path / "out" / INDEX).read_text())
  assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
  assert os.listdir(tmp_path) == ["out"]


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_HEADERS = {
  "a dtype of no one": (ONE | {"dtype": "F7"}, "dtype F7: known are"),
  "a list as dtype": (ONE | {"dtype": ["F32"]}, "dtype"),
  "a wrong byte count": (ONE | {"shape": [3]}, "12 bytes, but data_offsets give 8"),
  "a negative size": (ONE | {"shape": [-2]}, "a shape that is none"),
  "a fraction": (ONE | {"shape": [2.0]}, "a shape that is none"),
  "a truth": (ONE | {"shape": [True, 2]}, "a shape that is none"),
  "a huge size": (ONE | {"shape": [2**40, 2**40]}, "a shape too large"),
  "an empty huge size": (ONE | {"shape": [0, 2**61, 2]}, "a shape too large"),
  "many dimensions": (ONE | {"shape": [1] * 33}, "a shape that is none"),
  "offsets backwards": (ONE | {"data_offsets": [8, 0]}, "data_offsets that are none"),
  "three offsets": (ONE | {"data_offsets": [0, 8, 8]}, "data_offsets that are none"),
  "a gap": (ONE | {"data_offsets": [4, 12]}, "follows a gap"),
  "beyond the end": (
    ONE | {"shape": [200], "data_offsets": [0, 800]},
    "is cut off: 'a'|is cut off: a ends at byte",
  ),
  "a missing field": ({"dtype": "F32", "shape": [2]}, "needs dtype, shape"),
  "a further field": (ONE | {"device": "cpu"}, "needs dtype, shape"),
  "no object": (3, "needs dtype, shape"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_tensor_that_lies(tmp_path, case):
  field, says = BAD_HEADERS[case]
  path = tmp_path / "x.safetensors"
  raw_file(path, {"a": field}, bytes(8))
  with pytest.raises(SafetensorsError, match=says) as caught:
    SafetensorsFile(path)
  assert str(path) in str(caught.value)
  assert len(str(caught.value).splitlines()) == 1


BAD_FILES = {
  "overlap": (
    {"a": ONE, "b": ONE | {"data_offsets": [4, 12]}},
    bytes(12),
    "b overlaps another tensor",
  ),
  "rest": ({"a": ONE}, bytes(9), "1 bytes that belong to no tensor"),
  "twice": (b'{"a":1,"a":2}', b"", "a stands there twice"),
  "twice inside": (b'{"a":{"dtype":"F32","dtype":"F32"}}', b"", "dtype stands there"),
  "list": (b"[]", b"", "no JSON object"),
  "leading space": (b" {}", b"", "no JSON object"),
  "half": (b'{"a":', b"", "damaged header"),
  "not a number": (b'{"a":NaN}', b"", "NaN is no JSON"),
  "no text": (b'{"\xff":1}', b"", "damaged header"),
  "deep": (b'{"a":' + b"[" * 200_000, b"", "damaged header"),
  "long number": (b'{"a":' + b"9" * 10_000 + b"}", b"", "damaged header"),
  "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_header_that_lies(tmp_path, case):
  fields, data, says = BAD_FILES[case]
  raw_file(tmp_path / "x", fields, data)
  with pytest.raises(SafetensorsError, match=says):
    SafetensorsFile(tmp_path / "x")


@pytest.mark.parametrize("length", [9, 2**31, 2**63, 2**64 - 1, 100_000_001])
def test_a_length_that_lies(tmp_path, length):
  raw_file(tmp_path / "x", b"{}", length=length)
  with pytest.raises(SafetensorsError, match=f"header has {length} bytes"):
    SafetensorsFile(tmp_path / "x")


def test_every_truncation_is_noticed(tmp_path):
  write(tmp_path / "whole", {"a": np.ones((2, 3), np.float32)})
  data = (tmp_path / "whole").read_bytes()
  for length in range(len(data)):
    (tmp_path / "cut").write_bytes(data[:length])
    with pytest.raises(SafetensorsError, match="cut"):
      SafetensorsFile(tmp_path / "cut")


@pytest.fixture
def folder(tmp_path):
  """Two files of one tensor each, with an index."""
  path = tmp_path / "model"
  path.mkdir()
  for i in "01":
    write(path / f"{i}.safetensors", {f"w{i}": np.full(3, int(i), np.float32)})
  set_index(path, {"w0": "0.safetensors", "w1": "1.safetensors"})
  return path


def set_index(path, weight_map) -> None:
  (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
  "name", ["../0.safetensors", "/etc/passwd", "..", "", "a/0.safetensors", "a\\b", 5]
)
def test_a_file_outside_the_folder(folder, name):
  shutil.copy(folder / "0.safetensors", folder.parent)
  set_index(folder, {"w0": name, "w1": "1.safetensors"})
  with pytest.raises(SafetensorsError, match=r"places w0 in .* no file name"):
    SafetensorsFolder(folder)


def test_a_folder_that_contradicts_its_index(folder):
  assert set(SafetensorsFolder(folder).where) == {"w0", "w1"}
  set_index(folder, {"w0": "0.safetensors"})
  shutil.copy(folder / "0.safetensors", folder / "keep")
  write(folder / "0.safetensors", {"w0": np.ones(3), "w9": np.ones(3)})
  with pytest.raises(SafetensorsError, match=r"0\.safetensors holds w9"):
    SafetensorsFolder(folder)
  shutil.copy(folder / "keep", folder / "0.safetensors")
  set_index(folder, {"w0": "0.safetensors", "w7": "0.safetensors"})
  with pytest.raises(SafetensorsError, match=r"0\.safetensors does not hold w7"):
    SafetensorsFolder(folder)
  set_index(folder, {"w0": "0.safetensors", "w1": "2.safetensors"})
  with pytest.raises(SafetensorsError, match=r"2\.safetensors is missing.* w1"):
    SafetensorsFolder(folder)
  for text in ("{", "[]", '{"weight_map": {}}', '{"weight_map": []}', "\ud800"):
    (folder / INDEX).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SafetensorsError, match="index"):
      SafetensorsFolder(folder)
  (folder / INDEX).unlink()
  with pytest.raises(FileNotFoundError, match=SINGLE):
    SafetensorsFolder(folder)
  with pytest.raises(FileNotFoundError, match="is no folder"):
    SafetensorsFolder(folder / "absent")


def test_nothing_is_left_of_a_failed_write(tmp_path):
  out = tmp_path / "out"

  def fail(_):
    raise RuntimeError("the source broke")

  spec = Spec("a", "F32", (2,))
  header, ordered = writing.make_header([spec], {})
  with pytest.raises(RuntimeError), new_folder(out, 8) as part:
    writing.write_file(part / SINGLE, header, ordered, fail)
  assert os.listdir(tmp_path) == []
  for wrong in (np.zeros(3, np.float32), np.zeros(2, np.float64)):
    with pytest.raises(SafetensorsError, match="a should be F32"):
      writing.write_file(tmp_path / "x", header, ordered, lambda _, w=wrong: w)
  with pytest.raises(SafetensorsError, match="its disk has"), new_folder(out, 10**18):
    pass
  assert os.listdir(tmp_path) == ["x"]
  (tmp_path / "out.part").mkdir()  # of a killed export
  with new_folder(out, 8) as part:
    (part / "x").write_text("x")
  assert sorted(os.listdir(tmp_path)) == ["out", "x"]
  with pytest.raises(SafetensorsError, match="exists already"), new_folder(out, 8):
    pass


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path):
  big = np.zeros(1 << 20, np.float32)
  spec = Spec("big", "F32", big.shape)
  header, ordered = writing.make_header([spec], {})

  def export():
    with new_folder(tmp_path / "out", 8) as part:
      (part / SINGLE).symlink_to("/dev/full")
      writing.write_file(part / SINGLE, header, ordered, lambda _: big)

  with pytest.raises(SafetensorsError, match=r"disk is full: .*out"):
    export()
  assert os.listdir(tmp_path) == []
