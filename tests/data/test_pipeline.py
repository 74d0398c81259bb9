"""`make_data`: caches, resume, processes, validation and bad input, end to end."""

import itertools
import json
import os
import re
import shutil

import numpy as np
import pytest

from deepseek_jax.data import corpus as corpus_lib
from deepseek_jax.data.pipeline import make_data
from tests.data.corpora import make_config, make_gpt2_file, make_texts, write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  return write_texts(tmp_path_factory.mktemp("texts"), make_texts(40))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return tmp_path_factory.mktemp("run")


def take(iterator, n: int) -> np.ndarray:
  return np.stack([sample["tokens"] for sample in itertools.islice(iterator, n)])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 5, 700])  # an epoch has about 600 samples
def test_resume_equals_an_uninterrupted_run(texts, workdir, workers, taken):
  config = make_config(texts, workers=workers, fim_rate=0.3)
  data = make_data(config, workdir)
  assert taken < 700 or taken * 32 > data.epoch_tokens
  take(data.train, taken) if taken else None
  state = json.loads(json.dumps(data.train.get_state()))
  expected = take(data.train, 30)
  resumed = make_data(config, workdir)
  resumed.train.set_state(state)
  np.testing.assert_array_equal(take(resumed.train, 30), expected)
  # Back in the same iterator, as after a step that was not applied.
  data.train.set_state(state)
  np.testing.assert_array_equal(take(data.train, 30), expected)


def test_resume_just_before_an_epoch_ends(texts, workdir):
  config = make_config(texts, shuffle=False, fim_rate=0.3)
  data = make_data(config, workdir)
  before = data.epoch_tokens // 32 - 2
  take(data.train, before)
  state = data.train.get_state()
  expected = take(data.train, 10)
  resumed = make_data(config, workdir)
  resumed.train.set_state(state)
  np.testing.assert_array_equal(take(resumed.train, 10), expected)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_take_turns(texts, workdir, processes):
  config = make_config(texts, fim_rate=0.3)
  alone = take(make_data(config, workdir).train, 12 * processes)
  for process in range(processes):
    data = make_data(config, workdir, process, processes)
    np.testing.assert_array_equal(take(data.train, 12), alone[process::processes])


def test_validation_is_finite_fixed_and_shared_out(texts, workdir):
  config = make_config(texts, validation_fraction=0.2, fim_rate=1.0)
  data = make_data(config, workdir)
  everything = take(data.validation(), 10**6)
  assert len(everything) == data.validation_samples > 10
  np.testing.assert_array_equal(take(data.validation(), 10**6), everything)
  assert not np.isin(everything, [3, 4, 5]).any()  # no FIM
  parts = [make_data(config, workdir, p, 2) for p in range(2)]
  shares = [take(part.validation(), 10**6) for part in parts]
  assert len(shares[0]) == len(shares[1]) == len(everything) // 2
  for process, share in enumerate(shares):
    np.testing.assert_array_equal(share, everything[process::2][: len(share)])


def test_validation_documents_are_not_trained_on(texts, workdir):
  config = make_config(texts, validation_fraction=0.2, fim_rate=0.0)
  data = make_data(config, workdir)
  held_out = data.tokenizer.decode(take(data.validation(), 10**6)[:, 1:].reshape(-1))
  seen = data.tokenizer.decode(take(data.train, 1500)[:, 1:].reshape(-1))
  names = [f"# text {i}\n" for i in range(40)]
  assert sum(name in held_out for name in names) >= 6
  assert sum(name in seen for name in names) >= 20
  # Names cut by a window's end aside, none is on both sides.
  assert not [name for name in names if name in held_out and name in seen]


def test_bytes_per_token_is_of_the_validation_text(texts, workdir):
  config = make_config(texts, validation_fraction=0.2, seq_len=1)
  data = make_data(config, workdir)
  # Windows of one step: every token of the validation text, specials included.
  ids = take(data.validation(), 10**6)
  stream = [ids[0, 0], *ids[:, 1]]
  size = len(data.tokenizer.decode([i for i in stream if i >= 10]).encode())
  assert data.bytes_per_token == pytest.approx(size / len(stream), rel=1e-6)


def test_without_validation(texts, workdir):
  data = make_data(make_config(texts, validation_fraction=0.0), workdir)
  assert list(data.validation()) == []
  assert data.validation_samples == 0
  assert data.bytes_per_token > 1


def test_the_standard_library_by_default(tmp_path):
  config = make_config("", max_bytes=200_000, mask_documents=True)
  data = make_data(config, tmp_path)
  sample = next(data.train)
  assert sample["tokens"].shape == sample["segments"].shape == (33,)
  assert "import" in data.tokenizer.decode(take(data.train, 200).reshape(-1))
  assert 1.5 < data.bytes_per_token < 6


def cache_of(folder):
  (path,) = (folder / "data").iterdir()
  return path


def damage_tokens(path):
  data = bytearray((path / "tokens.bin").read_bytes())
  data[100] ^= 1
  (path / "tokens.bin").write_bytes(data)


def damage_length(path):
  os.truncate(path / "offsets.npy", 200)


def damage_meta(path):
  (path / "meta.json").write_text("{")


def remove_sizes(path):
  (path / "sizes.npy").unlink()


def test_the_cache_is_used_again(texts, tmp_path, monkeypatch):
  first = take(make_data(make_config(texts), tmp_path).train, 50)
  monkeypatch.setattr(corpus_lib, "_build", None)  # must not be called
  # Another window, seed or FIM rate needs no other tokens.
  make_data(make_config(texts, seq_len=64, seed=3, fim_rate=0.9), tmp_path)
  second = take(make_data(make_config(texts), tmp_path).train, 50)
  np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
  "damage", [damage_tokens, damage_length, damage_meta, remove_sizes, shutil.rmtree]
)
def test_a_damaged_cache_is_made_again(texts, tmp_path, damage):
  expected = take(make_data(make_config(texts), tmp_path).train, 50)
  path = cache_of(tmp_path)
  tokens = (path / "tokens.bin").read_bytes()
  damage(path)
  np.testing.assert_array_equal(
    take(make_data(make_config(texts), tmp_path).train, 50), expected
  )
  assert cache_of(tmp_path) == path
  assert (path / "tokens.bin").read_bytes() == tokens


def test_a_failed_build_leaves_nothing_and_a_killed_one_is_cleared(texts, tmp_path):
  bad = write_texts(tmp_path / "bad", make_texts(5))
  (bad / "x.jsonl").write_text("{")
  with pytest.raises(ValueError, match=r"x.jsonl, line 1"):
    make_data(make_config(bad, tokenizer=str(make_gpt2(tmp_path))), tmp_path / "run")
  assert list((tmp_path / "run" / "data").iterdir()) == []
  make_data(make_config(texts), tmp_path / "other")
  path = cache_of(tmp_path / "other")
  path.rename(path.with_name(f"{path.name}.0.tmp"))  # killed just before the end
  make_data(make_config(texts), tmp_path / "other")
  assert cache_of(tmp_path / "other") == path


def test_changed_files_are_tokenised_anew(tmp_path):
  folder = write_texts(tmp_path / "texts", make_texts(10))
  before = make_data(make_config(folder), tmp_path / "run").epoch_tokens
  (folder / "new.txt").write_text("def value\n" * 100)
  after = make_data(make_config(folder), tmp_path / "run").epoch_tokens
  assert after > before + 100


def make_gpt2(folder, vocab_size: int = 300):
  return make_gpt2_file(folder / "gpt2.json", ["<|endoftext|>"], vocab_size)


def test_a_tokenizer_by_path_without_bos(texts, tmp_path):
  config = make_config(texts, tokenizer=str(make_gpt2(tmp_path)), fim_rate=0.0)
  data = make_data(config, tmp_path / "run")
  ids = take(data.train, 300).reshape(-1)
  assert data.tokenizer.bos is None
  assert 0 < np.mean(ids == data.tokenizer.eos) < 0.1
  assert (tmp_path / "run" / "tokenizer.json").exists()


def test_vocabularies_beyond_16_bits(texts, tmp_path):
  path = make_gpt2(tmp_path)
  definition = json.loads(path.read_text())
  definition["added_tokens"][0]["id"] = 70_000  # <|endoftext|>
  definition["model"]["vocab"] = {
    (f"{i}" if token == "<|endoftext|>" else token): i
    for token, i in definition["model"]["vocab"].items()
  } | {"def": 69_999, "de": 69_998, "<|endoftext|>": 70_000}
  definition["model"]["merges"] = [["d", "e"], ["de", "f"]]
  path.write_text(json.dumps(definition))
  config = make_config(
    texts, tokenizer=str(path), fim_rate=0.0, vocab_size=70_001, seq_len=200
  )
  data = make_data(config, tmp_path / "run")
  assert data.tokenizer.vocab_size == 70_001
  meta = json.loads((cache_of(tmp_path / "run") / "meta.json").read_text())
  assert meta["dtype"] == "uint32"
  ids = take(data.train, 100)
  assert ids.dtype == np.int32
  assert {69_999, 70_000} <= set(ids.reshape(-1).tolist())
  assert "# text" in data.tokenizer.decode(ids.reshape(-1))


def test_bad_settings_are_one_line(texts, tmp_path):
  gpt2 = str(make_gpt2(tmp_path))
  empty = write_texts(tmp_path / "empty", ["", ""])
  single = write_texts(tmp_path / "single", ["just one"])
  short = write_texts(tmp_path / "short", ["a few", "words"])
  cases = (
    (
      make_config(texts, vocab_size=300),
      "data.tokenizer_vocab=400 exceeds model.vocab_size=300: lower the former or",
    ),
    (
      make_config(texts, tokenizer=gpt2, vocab_size=299, fim_rate=0.0),
      f"{gpt2} has 300 entries, more than model.vocab_size=299: raise the latter",
    ),
    (
      make_config(texts, tokenizer=gpt2, fim_rate=0.1),
      f"data.fim_rate=0.1 needs fill-in-the-middle tokens, which {gpt2} does not have: "
      "set data.fim_rate=0",
    ),
    (make_config(empty), f"data.path='{empty}' has no text"),
    (
      make_config(single),
      "data.validation_fraction=0.02 leaves no document for training of 1",
    ),
    (
      make_config(short, validation_fraction=0.0, seq_len=250),
      "tokens, fewer than a window of train.seq_len + 1 = 251: give more text or lower",
    ),
  )
  for i, (config, message) in enumerate(cases):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
      make_data(config, tmp_path / f"run{i}")
    assert "\n" not in str(caught.value)
