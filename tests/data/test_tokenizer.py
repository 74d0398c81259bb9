"""V3's splitting rules, special tokens, and the tokenizer that a workdir keeps."""

import random
import re

import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers

from deepseek_jax.data import tokenizer as tokenizer_lib
from deepseek_jax.data.sources import Documents
from deepseek_jax.data.tokenizer import (
  SPECIALS,
  V3_SPLITS,
  Tokenizer,
  prepare_tokenizer,
  sample_pieces,
  split_pieces,
  train_tokenizer,
)
from tests.data.corpora import make_gpt2_file, make_texts, make_tokenizer


def split(text: str) -> list[str]:
  rules = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in V3_SPLITS]
  pieces = pre_tokenizers.Sequence(rules).pre_tokenize_str(text)
  return [piece for piece, _ in pieces]


@pytest.mark.parametrize(
  ("text", "pieces"),
  [
    ("1234567", ["123", "456", "7"]),
    ("x12345y", ["x", "123", "45", "y"]),
    ("in 2024", ["in", " ", "202", "4"]),
    ("abc数据です", ["abc", "数据です"]),
    ("カタ漢字ok", ["カタ漢字", "ok"]),
    ("f(x);\n\n  y", ["f", "(x", ");\n\n", " ", " y"]),  # punctuation takes the breaks
    ("a  \n b", ["a", "  \n", " b"]),
    (" hello_world", [" hello", "_world"]),
    ("x != y", ["x", " !=", " y"]),
    ("a   b", ["a", "  ", " b"]),
    ("na\u0308ive", ["na\u0308ive"]),  # a combining mark stays with its letter
  ],
)
def test_v3_splits(text, pieces):
  assert split(text) == pieces


def test_special_tokens_come_first_with_v3_names():
  tokenizer = make_tokenizer(300)
  for i, name in enumerate(SPECIALS):
    assert tokenizer.token_id(name) == i
  assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 2)
  assert (tokenizer.fim_hole, tokenizer.fim_begin, tokenizer.fim_end) == (3, 4, 5)
  assert tokenizer.vocab_size == 300


def test_any_text_round_trips():
  tokenizer = make_tokenizer()
  for text in ("", "\x00\t\r\n", "日本語 кот \U0001f600 e\u0301", *make_texts(5)):
    assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.encode("def") == tokenizer.encode("def", add_bos=True)[1:]
  assert tokenizer.encode("", add_bos=True) == [tokenizer.bos]


def test_specials_count_in_prompts_and_not_in_documents():
  tokenizer = make_tokenizer()
  text = "a<｜fim▁hole｜>b</think>"
  assert tokenizer.fim_hole in tokenizer.encode(text)
  (ids,) = tokenizer.encode_documents([text])
  assert min(ids) >= len(SPECIALS)
  assert tokenizer.decode(ids.tolist()) == text


def test_token_id_wants_exactly_one_token():
  with pytest.raises(ValueError, match=r"'def return' is \d+ tokens of .*, not one"):
    make_tokenizer().token_id("def return")


def test_training_is_deterministic_and_bounded():
  assert make_tokenizer().to_json() == make_tokenizer().to_json()
  with pytest.raises(ValueError, match=r"data.tokenizer_vocab=100 must be >= 266"):
    train_tokenizer(["x"], 100)


def test_long_documents_are_cut_without_a_trace(monkeypatch):
  tokenizer = make_tokenizer()
  texts = make_texts(20)
  whole = [tokenizer.encode(text) for text in texts]
  monkeypatch.setattr(tokenizer_lib, "_PIECE", 100)
  assert max(len(list(split_pieces(text))) for text in texts) > 5
  assert ["".join(split_pieces(text)) for text in texts] == texts
  for expected, ids in zip(whole, tokenizer.encode_documents(texts), strict=True):
    np.testing.assert_array_equal(ids, expected)


def test_ascii_texts_take_the_fast_way_to_the_same_tokens():
  tokenizer = train_tokenizer(Documents(max_bytes=200_000), 1000)
  rng = random.Random(0)
  # Every kind of neighbour that the rules tell apart, and real code.
  units = [
    "a",
    "Bc",
    "7",
    "0",
    "(",
    "_",
    "=",
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\v",
    "\f",
  ]
  texts = ["".join(rng.choices(units, k=rng.randint(0, 12))) for _ in range(5000)]
  texts += [
    piece for text in Documents(max_bytes=400_000) for piece in split_pieces(text)
  ]
  words = tokenizer._ascii
  assert words is not None
  texts = [text for text in texts if words.accepts(text)]
  assert len(texts) > 5000
  for expected, ids in zip(tokenizer._encode_plain(texts), words.encode(texts)):
    assert ids.tolist() == expected
  for text in ("\x00a", "\x1f", "\x7f", "é"):
    assert not words.accepts(text)


def test_a_tokenizer_without_v3_rules_gets_whole_documents(tmp_path, monkeypatch):
  path = make_gpt2_file(tmp_path / "t.json", ["<|endoftext|>"], vocab_size=400)
  tokenizer = Tokenizer.from_file(path)
  assert tokenizer._ascii is None
  texts = [text.replace(";\n", " \n\n") for text in make_texts(20)]
  monkeypatch.setattr(tokenizer_lib, "_PIECE", 100)
  for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
    assert tokenizer.encode(text) == ids.tolist()


def test_sample_is_seeded_uniform_and_bounded():
  texts = [f"{i:09}\n" for i in range(1000)]
  sample = sample_pieces(texts, 0, 1000)
  assert sample == sample_pieces(iter(texts), 0, 1000)
  assert sample != sample_pieces(texts, 1, 1000)
  assert len(set(sample)) == len(sample) == 100
  assert 350 < np.mean([int(text) for text in sample]) < 650
  assert sorted(sample_pieces(texts, 0, 10**6)) == texts


def test_special_tokens_of_other_tokenizers(tmp_path):
  names = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
  tokenizer = Tokenizer.from_file(make_gpt2_file(tmp_path / "a.json", names))
  assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (None, 0, 0)
  assert (tokenizer.fim_begin, tokenizer.fim_end, tokenizer.fim_hole) == (1, 2, 3)
  tokenizer = Tokenizer.from_file(
    make_gpt2_file(tmp_path / "b.json", ["<s>", "</s>", "<pad>"])
  )
  assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 2)
  assert tokenizer.fim_begin is None


def test_bad_tokenizers(tmp_path):
  path = make_gpt2_file(tmp_path / "a.json", ["<unk>"])
  with pytest.raises(ValueError, match=r"a.json has no end-of-document token: add"):
    Tokenizer.from_file(path)
  path.write_text('{"half": ')
  with pytest.raises(ValueError, match=r"a.json is not a Hugging Face tokenizer.json"):
    Tokenizer.from_file(path)
  with pytest.raises(FileNotFoundError, match=r"the tokenizer '.*gone' does not exist"):
    Tokenizer.from_file(tmp_path / "gone")


def test_the_workdir_keeps_its_tokenizer(tmp_path):
  texts, own = make_texts(20), tmp_path / "run" / "tokenizer.json"
  first = prepare_tokenizer("", texts, 300, 0, tmp_path / "run")
  data = own.read_bytes()
  assert not list(own.parent.glob("*.tmp"))
  # Other texts, same tokenizer: a run must not change its vocabulary.
  again = prepare_tokenizer("", make_texts(20, seed=9), 400, 0, tmp_path / "run")
  assert again.to_json() == first.to_json()
  own.write_bytes(data[: len(data) // 2])
  prepare_tokenizer("", texts, 300, 0, tmp_path / "run")
  assert own.read_bytes() == data
  message = "tokenizer.json has 300 entries, more than data.tokenizer_vocab=280"
  with pytest.raises(ValueError, match=message):
    prepare_tokenizer("", texts, 280, 0, tmp_path / "run")
  other = make_gpt2_file(tmp_path / "other.json", ["</s>"])
  message = f"is another tokenizer than data.tokenizer='{other}': use another workdir"
  with pytest.raises(ValueError, match=re.escape(message)):
    prepare_tokenizer(str(other), texts, 300, 0, tmp_path / "run")
  assert own.read_bytes() == data


def test_a_given_tokenizer_is_copied_to_the_workdir(tmp_path):
  path = make_gpt2_file(tmp_path / "other.json", ["</s>"])
  given = prepare_tokenizer(str(path), [], 300, 0, tmp_path / "run")
  copy = Tokenizer.from_file(tmp_path / "run" / "tokenizer.json")
  assert given.to_json() == copy.to_json()
