"""12,000 damaged files: each is read whole or refused, quickly and in little memory.

Three kinds of damage to a small valid file: bits flipped, the end cut off or repeated,
and headers put together from fragments that a careless reader would believe. A file
that is accepted must also give every tensor that it lists. The only error allowed is
SafetensorsError.
"""

import json
import random
import tracemalloc

import numpy as np

from deepseek_jax.io.safetensors import SafetensorsError, SafetensorsFile
from deepseek_jax.io.safetensors_write import Spec, make_header

CASES = 4_000  # of each kind
MEMORY = 16 << 20  # bytes, at any moment


def valid_file() -> bytes:
  specs = [
    Spec("model.a.weight", "F8_E4M3", (3, 5)),
    Spec("model.a.weight_scale_inv", "F32", (1, 1)),
    Spec("model.b", "BF16", (2, 4)),
    Spec("empty", "I64", (0, 2)),
  ]
  header, ordered = make_header(specs, {"format": "pt"})
  data = np.random.default_rng(0).bytes(sum(spec.size for spec in ordered))
  return len(header).to_bytes(8, "little") + header + data


def flip_bits(data: bytes, chance: random.Random) -> bytes:
  damaged = bytearray(data)
  for _ in range(chance.choice((1, 1, 2, 3, 8))):
    place = chance.randrange(len(damaged) * 8)
    damaged[place // 8] ^= 1 << place % 8
  return bytes(damaged)


def cut_and_repeat(data: bytes, chance: random.Random) -> bytes:
  a, b = sorted(chance.randrange(len(data) + 1) for _ in "ab")
  return chance.choice(
    (data[:a], data[:a] + data[b:], data[:b] + data[a:], data + data[a:b])
  )


NUMBERS = (
  "0 1 2 -1 3.5 1e300 -0 8 2147483648 9223372036854775808 18446744073709551615 "
  f'{10**40} true null NaN Infinity [] {{}} "8"'
).split()
DTYPES = ['"F32"', '"BF16"', '"F8_E4M3"', '"F4"', '""', "null", "1", '"f32"', '"U64"']
NAMES = ['"a"', '"a"', '"b"', '""', '"__metadata__"', r'"\u0000"', r'"\ud800"', '"ü"']


def make_up(data: bytes, chance: random.Random) -> bytes:
  def numbers(most: int) -> str:
    picked = [chance.choice(NUMBERS) for _ in range(chance.randrange(most + 1))]
    return "[" + ",".join(picked) + "]"

  def tensor() -> str:
    fields = [
      f'"dtype":{chance.choice(DTYPES)}',
      f'"shape":{numbers(4)}',
      f'"data_offsets":{chance.choice(("[0,8]", "[8,16]", "[0,0]", numbers(3)))}',
    ]
    if chance.random() < 0.1:
      fields.append(chance.choice(('"x":1', '"dtype":"F32"')))
    chance.shuffle(fields)
    return "{" + ",".join(fields[: chance.choice((3, 3, 3, 4, 2, 0))]) + "}"

  entries = [
    f"{chance.choice(NAMES)}:{tensor() if chance.random() < 0.9 else numbers(2)}"
    for _ in range(chance.randrange(5))
  ]
  header = ("{" + ",".join(entries) + "}").encode("utf-8", "surrogatepass")
  if chance.random() < 0.05:
    header = chance.choice((b"[" * 5000, b'{"a":' * 5000, b"{" + b"9" * 6000, b"\xff"))
  header += chance.choice((b"", b" ", b"  ", b"\n", b"\0"))
  length = len(header)
  if chance.random() < 0.2:
    length = chance.choice((0, 1, length + 1, length - 1, 2**63, 2**64 - 1, 10**8))
  tail = chance.choice((b"", bytes(8), bytes(16), data))
  return max(length, 0).to_bytes(8, "little") + header + tail


def read_all(path) -> bool:
  """Whether the file was accepted; then every tensor must be there."""
  try:
    file = SafetensorsFile(path)
  except SafetensorsError as error:
    message = str(error)
    assert str(path) in message
    assert len(message) < 700
    assert message.isprintable()
    return False
  for name, entry in file.entries.items():
    tensor = file.read(name)
    assert tensor.shape == entry.shape
    assert tensor.nbytes == entry.stop - entry.start
    tensor.tobytes()
  return True


def test_damaged_files(tmp_path):
  data, chance = valid_file(), random.Random(0)
  path = tmp_path / "file"
  path.write_bytes(data)
  assert read_all(path)
  accepted = {}
  tracemalloc.start()
  try:
    for damage in (flip_bits, cut_and_repeat, make_up):
      accepted[damage] = 0
      for _ in range(CASES):
        path.write_bytes(damage(data, chance))
        accepted[damage] += read_all(path)
    assert tracemalloc.get_traced_memory()[1] < MEMORY
  finally:
    tracemalloc.stop()
  # Flips in the data, or to another type as wide or another name, are no damage.
  assert 0 < accepted[flip_bits] < CASES / 2
  assert accepted[cut_and_repeat] < CASES / 20
  assert 0 < accepted[make_up] < CASES / 5


def test_a_long_header_is_no_long_wait(tmp_path):
  """50,000 tensors in one place, and one name twice among 50,000."""
  path = tmp_path / "file"
  one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
  overlapping = json.dumps({str(i): one for i in range(50_000)})
  twice = '{"x":1,' + ",".join(f'"{i}":1' for i in range(50_000)) + ',"x":1}'
  for text in (overlapping, twice):
    header = text.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert not read_all(path)
