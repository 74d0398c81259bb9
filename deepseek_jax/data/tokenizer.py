"""Byte-level BPE with DeepSeek-V3's splitting rules, and any HF tokenizer.json.

A tokenizer trained here differs from V3's in its size, its data and the places of its
special tokens: V3's vocabulary has 128,000 entries and its specials partly at the end
(128798 and later); ours has them first, with V3's names, and V3's ids for the three
that V3 also has first. Left out: V3's random splitting of merged punctuation and line
breaks during training, whose share is unpublished (DeepSeek-V3 report, section 4.1).
"""

import itertools
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from deepseek_jax.data.ascii_words import AsciiWords

# The rules of V3's tokenizer.json, applied one after the other: digits in runs of at
# most three; Chinese characters and kana apart; then words (with one leading space or
# sign), punctuation (which takes the line breaks that follow), and white space.
V3_SPLITS = (
  r"\p{N}{1,3}",
  r"[一-龥぀-ゟ゠-ヿ]+",
  r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
  r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
  r"| ?[\p{P}\p{S}]+[\r\n]*"
  r"|\s*[\r\n]+"
  r"|\s+(?!\S)"
  r"|\s+",
)
# In the order of their ids in a tokenizer trained here.
SPECIALS = (
  "<｜begin▁of▁sentence｜>",
  "<｜end▁of▁sentence｜>",
  "<｜▁pad▁｜>",
  "<｜fim▁hole｜>",
  "<｜fim▁begin｜>",
  "<｜fim▁end｜>",
  "<｜User｜>",
  "<｜Assistant｜>",
  "<think>",
  "</think>",
)
# Names of the same roles in the tokenizers of others; the first one present counts.
_NAMES = {
  "bos": (SPECIALS[0], "<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>"),
  "eos": (SPECIALS[1], "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>"),
  "pad": (SPECIALS[2], "<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
  "fim_hole": (SPECIALS[3], "<|fim_suffix|>", "<fim_suffix>", "<fim-suffix>", "▁<SUF>"),
  "fim_begin": (
    SPECIALS[4],
    "<|fim_prefix|>",
    "<fim_prefix>",
    "<fim-prefix>",
    "▁<PRE>",
  ),
  "fim_end": (SPECIALS[5], "<|fim_middle|>", "<fim_middle>", "<fim-middle>", "▁<MID>"),
}
_PIECE = 1 << 12  # characters
_SAMPLE_BYTES = 4_000_000  # text that a tokenizer is trained on
_CUT = re.compile(r"\n(?=\S)")


class Tokenizer:
  """A HF tokenizer and the ids of its special tokens.

  Attributes:
    vocab_size: 1 + the largest id.
    bos: begin of sentence, or None if the tokenizer has none.
    eos: end of sentence.
    pad: padding; `eos` if the tokenizer has none.
    fim_begin, fim_hole, fim_end: fill-in-the-middle tokens, or None.
  """

  def __init__(
    self,
    backend: tokenizers.Tokenizer,
    name: str,
    roles: Mapping[str, str] | None = None,
  ):
    """`name` says in errors which tokenizer this is.

    `roles` gives the texts of special tokens by role (bos, eos, pad) where they are
    known; otherwise they are found by the names in use.
    """
    backend.no_truncation()
    backend.no_padding()
    self.name = name
    self._backend = backend
    vocabulary = backend.get_vocab(with_added_tokens=True)
    self.vocab_size = 1 + max(vocabulary.values(), default=0)

    def find(role: str) -> int | None:
      known = (roles or {}).get(role)
      if known is not None and known not in vocabulary:
        raise ValueError(f"{name} has no token {known!r}, its {role} token")
      names = _NAMES[role] if known is None else (known,)
      return next((vocabulary[n] for n in names if n in vocabulary), None)

    eos = find("eos")
    if eos is None:
      raise ValueError(
        f"{name} has no end-of-document token: add one of {', '.join(_NAMES['eos'])}"
      )
    self.bos, self.eos = find("bos"), eos
    pad = find("pad")
    self.pad = eos if pad is None else pad
    self.fim_begin, self.fim_hole = find("fim_begin"), find("fim_hole")
    self.fim_end = find("fim_end")
    self._plain = _without_specials(backend)
    self._cuts_lines = all(
      self._encode_plain([line + "word"])[0]
      == [id_ for ids in self._encode_plain([line, "word"]) for id_ in ids]
      for line in ("x\n", ".\n\n", "x  \n\n")
    )
    self._ascii = AsciiWords(self._encode_plain) if _has_v3_rules(backend) else None

  @classmethod
  def from_file(
    cls, path: str | os.PathLike[str], roles: Mapping[str, str] | None = None
  ) -> "Tokenizer":
    """Raises FileNotFoundError, or ValueError if it is not a tokenizer.json."""
    if not os.path.isfile(path):
      raise FileNotFoundError(f"the tokenizer {os.fspath(path)!r} does not exist")
    try:
      backend = tokenizers.Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # tokenizers raises bare Exceptions
      raise ValueError(
        f"{path} is not a Hugging Face tokenizer.json: {error}"
      ) from None
    return cls(backend, os.fspath(path), roles)

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes tokenizer.json whole or not at all."""
    partial = f"{os.fspath(path)}.{os.getpid()}.tmp"
    with open(partial, "w", encoding="utf-8") as stream:
      stream.write(self.to_json())
      stream.flush()
      os.fsync(stream.fileno())
    os.replace(partial, path)

  def to_json(self) -> str:
    return self._backend.to_str(pretty=True)

  def encode(self, text: str, add_bos: bool = False) -> list[int]:
    """Ids of a prompt: the names of special tokens in it become these tokens.

    `add_bos` puts `bos` in front, as at the start of every training document.
    """
    ids = self._backend.encode(text, add_special_tokens=False).ids
    return [self.bos, *ids] if add_bos and self.bos is not None else ids

  def decode(self, ids: Sequence[int]) -> str:
    """The text, special tokens by name; bytes that are no UTF-8 become U+FFFD."""
    return self._backend.decode(list(ids), skip_special_tokens=False)

  def token_id(self, text: str) -> int:
    """The id of `text`; a ValueError if it is not exactly one token."""
    ids = self.encode(text)
    if len(ids) != 1:
      raise ValueError(f"{text!r} is {len(ids)} tokens of {self.name}, not one")
    return ids[0]

  def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of many texts, on all cores; nothing in them becomes a special token.

    Long texts are cut into pieces so that memory stays bounded and cores busy. The
    cuts lie after a line break with text behind it, where V3's rules cut anyway; a
    tokenizer that does not (SentencePiece's, say) gets whole texts.
    """
    split = split_pieces if self._cuts_lines else lambda text: [text]
    pieces = [list(split(text)) for text in texts]
    encoded = iter(self._encode_pieces([p for parts in pieces for p in parts]))
    return [np.concatenate([next(encoded) for _ in parts]) for parts in pieces]

  def _encode_pieces(self, pieces: list[str]) -> list[np.ndarray]:
    easy = [bool(self._ascii) and self._ascii.accepts(piece) for piece in pieces]
    others = self._encode_plain([p for p, is_easy in zip(pieces, easy) if not is_easy])
    hard = (np.array(ids, np.uint32) for ids in others)
    if not self._ascii:
      return list(hard)
    fast = iter(self._ascii.encode(list(itertools.compress(pieces, easy))))
    return [next(fast if is_easy else hard) for is_easy in easy]

  def _encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
    encoded = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encoded]


def _v3_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
  splits = [
    pre_tokenizers.Split(tokenizers.Regex(rule), "isolated") for rule in V3_SPLITS
  ]
  to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  return pre_tokenizers.Sequence([*splits, to_bytes])  # pyright: ignore


def _has_v3_rules(backend: tokenizers.Tokenizer) -> bool:
  """Whether `backend` splits text exactly as those trained here do."""
  ours = tokenizers.Tokenizer(models.BPE())
  ours.pre_tokenizer = _v3_pre_tokenizer()  # pyright: ignore[reportAttributeAccessIssue]
  mine, theirs = json.loads(ours.to_str()), json.loads(backend.to_str())
  return (
    theirs["normalizer"] is None
    and theirs["pre_tokenizer"] == mine["pre_tokenizer"]
    and theirs["model"]["type"] == "BPE"
    and not theirs["model"]["dropout"]
    and {token["content"] for token in theirs["added_tokens"]} <= _special_names()
  )


def _special_names() -> set[str]:
  return {name for names in _NAMES.values() for name in names} | set(SPECIALS)


def _without_specials(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  """A copy to which the names of special tokens are ordinary text."""
  names = _special_names()
  definition = json.loads(backend.to_str())
  for token in definition["added_tokens"]:
    # Some tokenizers, V3's among them, do not mark all of these as special.
    token["special"] = token["special"] or token["content"] in names
  plain = tokenizers.Tokenizer.from_str(json.dumps(definition))
  plain.encode_special_tokens = True
  return plain


def split_pieces(text: str) -> Iterator[str]:
  """Cuts a text at line breaks into pieces of about 4 KB; at least one."""
  start = 0
  while len(text) - start > _PIECE:
    cut = _CUT.search(text, start + _PIECE)
    if not cut:
      break
    yield text[start : cut.end()]
    start = cut.end()
  yield text[start:]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """A byte-level BPE of at most `vocab_size` entries, specials included.

  Raises:
    ValueError: no room for the specials and the 256 bytes.
  """
  least = len(SPECIALS) + 256
  if vocab_size < least:
    raise ValueError(
      f"data.tokenizer_vocab={vocab_size} must be >= {least}: {len(SPECIALS)} special "
      "tokens and 256 bytes"
    )
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = _v3_pre_tokenizer()  # pyright: ignore
  backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIALS),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator(texts, trainer)
  return Tokenizer(backend, "the tokenizer trained here")


def sample_pieces(texts: Iterable[str], seed: int, n_bytes: int) -> list[str]:
  """A uniform sample of the texts' pieces, of about `n_bytes` or all there is."""
  draw = random.Random(seed)
  chosen: list[tuple[float, str]] = []
  total, bound = 0, 1.0
  for text in texts:
    for piece in split_pieces(text):
      key = draw.random()
      if key < bound:
        chosen.append((key, piece))
        total += len(piece)
    if total > 2 * n_bytes:  # keep the smallest keys
      chosen, total, bound = _smallest(chosen, n_bytes)
  return [piece for _, piece in _smallest(chosen, n_bytes)[0]]


def _smallest(
  chosen: list[tuple[float, str]], n_bytes: int
) -> tuple[list[tuple[float, str]], int, float]:
  """The pieces of smallest keys until `n_bytes`, their size and a bound of keys."""
  chosen.sort(key=lambda item: item[0])
  total = 0
  for i, (key, piece) in enumerate(chosen):
    total += len(piece)
    if total >= n_bytes:
      return chosen[: i + 1], total, key
  return chosen, total, 1.0


def prepare_tokenizer(
  path: str, texts: Iterable[str], vocab_size: int, seed: int, workdir: Path
) -> Tokenizer:
  """The run's tokenizer, which from now on stands in workdir/tokenizer.json.

  That is the one at `path`; without a path the one that the workdir already has, or
  else one trained on a sample of `texts`. A damaged workdir/tokenizer.json is made
  again; a whole one is never replaced.

  Raises:
    FileNotFoundError, ValueError: no such file, not a tokenizer, or not the one that
      the workdir has.
  """
  own = workdir / "tokenizer.json"
  try:
    existing = Tokenizer.from_file(own)
  except (FileNotFoundError, ValueError):
    existing = None
  if path:
    tokenizer = Tokenizer.from_file(path)
    if existing and existing.to_json() != tokenizer.to_json():
      raise ValueError(
        f"{own} is another tokenizer than data.tokenizer={path!r}: use another workdir"
      )
  elif existing:
    if existing.vocab_size > vocab_size:
      raise ValueError(
        f"{own} has {existing.vocab_size} entries, more than data.tokenizer_vocab="
        f"{vocab_size}: use another workdir"
      )
    return existing
  else:
    tokenizer = train_tokenizer(sample_pieces(texts, seed, _SAMPLE_BYTES), vocab_size)
  if not existing:
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(own)
  return tokenizer
