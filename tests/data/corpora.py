"""Small texts, tokenizers and configs for the data tests."""

import dataclasses
import random
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from deepseek_jax.config import Config, DataConfig, TrainConfig
from deepseek_jax.data.corpus import Corpus, load_corpus
from deepseek_jax.data.sources import Documents
from deepseek_jax.data.tokenizer import Tokenizer, train_tokenizer
from deepseek_jax.presets import TINY

WORDS = ["def", "return", "import", "value", "index", "list", "for", "in", "if", "else"]
WORDS += ["数据", "data", "x1", "42", "2024"]


def make_texts(n: int, seed: int = 0) -> list[str]:
  """Different texts of 1 to 60 lines of code-like words."""
  rng = random.Random(seed)

  def line() -> str:
    return " " * rng.choice((0, 2, 4)) + " ".join(rng.choices(WORDS, k=6)) + ");"

  return [
    f"# text {i}\n" + "".join(line() + "\n" for _ in range(rng.randint(1, 60)))
    for i in range(n)
  ]


def write_texts(folder: Path, texts: list[str]) -> Path:
  folder.mkdir(parents=True, exist_ok=True)
  for i, text in enumerate(texts):
    (folder / f"{i:04}.txt").write_bytes(text.encode())
  return folder


def make_tokenizer(vocab_size: int = 400) -> Tokenizer:
  return train_tokenizer(make_texts(50, seed=1), vocab_size)


def make_corpus(folder: Path, n: int = 40) -> tuple[list[str], Tokenizer, Corpus]:
  texts, tokenizer = make_texts(n), make_tokenizer()
  documents = Documents(str(write_texts(folder / "texts", texts)))
  return texts, tokenizer, load_corpus(documents, tokenizer, folder / "cache")


def make_gpt2_file(path: Path, specials: list[str], vocab_size: int = 300) -> Path:
  """A tokenizer.json in the manner of GPT-2, with special tokens of one's choice."""
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=specials,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator(make_texts(10), trainer)
  backend.save(str(path))
  return path


def make_config(path: Path | str, **data) -> Config:
  seq_len = data.pop("seq_len", 32)
  seed = data.pop("seed", 0)
  vocab_size = data.pop("vocab_size", TINY.vocab_size)
  data = {"tokenizer_vocab": 400, "workers": 0, **data}
  return Config(
    seed=seed,
    model=dataclasses.replace(TINY, vocab_size=vocab_size),
    train=TrainConfig(seq_len=seq_len, batch_size=4),
    data=DataConfig(path=str(path), **data),
  )
