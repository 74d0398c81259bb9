"""From documents to training samples: order, fill-in-the-middle, windows.

Every epoch is a permutation of the documents. A document becomes

    bos text eos                                              or, at `fim_rate`,
    bos fim_begin prefix fim_hole suffix fim_end middle eos

(prefix-suffix-middle, applied to documents before packing: DeepSeek-V3 report,
section 4.1; DeepSeek-Coder-V2, section 3.1). The papers write no `bos`, but
DeepSeek's tokenizers put it in front of every prompt, so the model must have seen it;
a tokenizer without one leaves it out. The epochs follow each other in one endless
stream of tokens, and window w is its tokens [w T, (w + 1) T]: neighbours share one
token, so that every token is predicted exactly once and none is dropped. Windows are
shuffled in blocks, since those of one long document would otherwise meet in a batch.

Prefix, middle and suffix are cut between tokens, at two uniformly drawn places. A cut
between characters would be closer to how a hole is made in an editor, but it changes
how many tokens the parts have; with the length known beforehand (three more than the
plain document) any sample can be computed from its index alone.

All randomness is a hash of (seed, purpose, epoch, index): nothing has a state, so
sample i is the same after a resume, on every mesh and for any number of processes.
"""

import math
import threading
from dataclasses import dataclass

import numpy as np

from deepseek_jax.data.corpus import Corpus
from deepseek_jax.data.tokenizer import Tokenizer

SPLIT, ORDER, FIM, CUT, WINDOW = range(5)  # purposes of random numbers
_ENDLESS = 1 << 48
_BLOCK = 1 << 14  # windows shuffled together, at most
_GOLDEN = 0x9E3779B97F4A7C15


def random_bits(seed: int, purpose: int, epoch: int, index: np.ndarray) -> np.ndarray:
  """A uint64 for each index: SplitMix64 (Steele et al. 2014), keyed step by step."""
  key = np.zeros(1, np.uint64)
  for part in (seed, purpose, epoch):
    key = _mix(key + np.uint64((part * 2 + 1) * _GOLDEN & 0xFFFFFFFFFFFFFFFF))
  return _mix(key ^ _mix(np.asarray(index).astype(np.uint64) + np.uint64(_GOLDEN)))


def _mix(x: np.ndarray) -> np.ndarray:
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def split_documents(
  corpus: Corpus, fraction: float, seed: int, seq_len: int
) -> tuple[np.ndarray, np.ndarray]:
  """Document numbers for training and for validation, both ascending.

  The validation documents are drawn by `seed`: `fraction` of all, at least one, and
  as many as one window needs. The training documents are all others.

  Raises:
    ValueError: no documents are left for training.
  """
  n = len(corpus)
  if not fraction:
    return np.arange(n), np.arange(0)
  order = np.argsort(random_bits(seed, SPLIT, 0, np.arange(n)), kind="stable")
  enough = 1 + np.searchsorted(np.cumsum(corpus.lengths[order] + 1), seq_len + 1)
  n_validation = max(1, round(fraction * n), int(enough))
  if n_validation >= n:
    raise ValueError(
      f"data.validation_fraction={fraction} leaves no document for training of {n} "
      f"(validation needs {seq_len + 1} tokens): set it to 0 or give more documents"
    )
  return np.sort(order[n_validation:]), np.sort(order[:n_validation])


@dataclass(frozen=True)
class _Epoch:
  documents: np.ndarray  # in the order of this epoch
  starts: np.ndarray  # [documents + 1], where each begins in the stream
  fim: np.ndarray  # bool, by document's place


class PackedSource:
  """Random access to the windows over an endless (or finite) stream of documents.

  `source[i]` is {'tokens': int32 [T + 1]} and with `segments` also {'segments': int32
  [T + 1]}: which document of the window (0, 1, ...) a token belongs to.

  Attributes:
    epoch_tokens: tokens of an epoch without those that FIM adds.
  """

  def __init__(
    self,
    corpus: Corpus,
    documents: np.ndarray,
    tokenizer: Tokenizer,
    seq_len: int,
    seed: int = 0,
    fim_rate: float = 0.0,
    shuffle: bool = True,
    segments: bool = False,
    endless: bool = True,
  ):
    self._corpus, self._documents = corpus, documents
    self._seq_len, self._seed = seq_len, seed
    self._fim_rate, self._shuffle, self._segments = fim_rate, shuffle, segments
    self._bos = [] if tokenizer.bos is None else [tokenizer.bos]
    self._eos = [tokenizer.eos]
    self._fim = (tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end)
    if fim_rate and None in self._fim:
      raise ValueError(
        f"data.fim_rate={fim_rate} needs fill-in-the-middle tokens, which "
        f"{tokenizer.name} does not have: set data.fim_rate=0"
      )
    self._lengths = corpus.lengths[documents] + len(self._bos) + 1
    self.epoch_tokens = int(self._lengths.sum())
    if self.epoch_tokens < seq_len + 1:
      raise ValueError(
        f"the training text has {self.epoch_tokens} tokens, fewer than a window of "
        f"train.seq_len + 1 = {seq_len + 1}: give more text or lower train.seq_len"
      )
    # Every token but the first is predicted; what fills no window is left out.
    self._n_windows = (self.epoch_tokens - 1) // seq_len
    self._length = _ENDLESS if endless else self._n_windows
    self._block = min(_BLOCK, self._n_windows)
    self._lock = threading.Lock()
    self._epochs: dict[int, _Epoch] = {}
    self._blocks: dict[int, np.ndarray] = {}

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    if not 0 <= index < self._length:
      raise IndexError(f"sample {index} of {self._length}")
    return self.window(self._shuffled(index) if self._shuffle else index)

  def window(self, w: int) -> dict[str, np.ndarray]:
    """Tokens [w T, (w + 1) T] of the stream, in the order of the stream."""
    position, stop = w * self._seq_len, (w + 1) * self._seq_len + 1
    tokens, segments = [], []
    number, segment = self._epoch_at(position), 0
    epoch = self._epoch(number)
    place = int(np.searchsorted(epoch.starts, position, side="right")) - 1
    while position < stop:
      if place == len(epoch.documents):
        number, place = number + 1, 0
        epoch = self._epoch(number)
      start, end = int(epoch.starts[place]), min(int(epoch.starts[place + 1]), stop)
      for part in self.document(number, place):
        piece = part[max(0, position - start) : max(0, end - start)]
        tokens.append(piece)
        segments.append(np.full(len(piece), segment, np.int32))
        position, start = position + len(piece), start + len(part)
      place, segment = place + 1, segment + 1
    sample = {"tokens": np.concatenate(tokens).astype(np.int32)}
    if self._segments:
      sample["segments"] = np.concatenate(segments)
    return sample

  def document(self, number: int, place: int) -> list[np.ndarray]:
    """Parts of the document at `place` of epoch `number`, to be concatenated."""
    epoch = self._epoch(number)
    document = int(epoch.documents[place])
    begin, end = self._corpus.offsets[document : document + 2]
    text = self._corpus.tokens[begin:end]
    if not epoch.fim[place]:
      return [_array(self._bos), text, _array(self._eos)]
    fim_begin, fim_hole, fim_end = self._fim
    draws = random_bits(
      self._seed, CUT, number, np.array([2 * document, 2 * document + 1])
    )
    first, second = sorted(int(draw) % (len(text) + 1) for draw in draws)
    return [
      _array([*self._bos, fim_begin]),
      text[:first],
      _array([fim_hole]),
      text[second:],
      _array([fim_end]),
      text[first:second],
      _array(self._eos),
    ]

  def _start(self, number: int) -> int:
    """Where epoch `number` begins in the stream."""
    return number * self.epoch_tokens + 3 * self._n_fim(number)

  def _n_fim(self, number: int) -> int:
    """FIM documents of all epochs before `number`: exactly the rate, rounded down."""
    return math.floor(self._fim_rate * len(self._documents) * number)

  def _epoch_at(self, position: int) -> int:
    mean = self.epoch_tokens + 3 * self._fim_rate * len(self._documents)
    number = int(position / mean)
    while self._start(number) > position:
      number -= 1
    while self._start(number + 1) <= position:
      number += 1
    return number

  def _epoch(self, number: int) -> _Epoch:
    with self._lock:
      if number not in self._epochs:
        while len(self._epochs) >= 2:  # the one that ends and the one that begins
          self._epochs.pop(next(iter(self._epochs)))
        self._epochs[number] = self._make_epoch(number)
      return self._epochs[number]

  def _make_epoch(self, number: int) -> _Epoch:
    n = len(self._documents)
    order = np.arange(n)
    if self._shuffle:
      order = np.argsort(self._random(ORDER, number, self._documents), kind="stable")
    fim = np.zeros(n, bool)
    count = self._n_fim(number + 1) - self._n_fim(number)
    if count:
      draws = self._random(FIM, number, self._documents)
      fim[np.argsort(draws, kind="stable")[:count]] = True
    fim = fim[order]
    ends = np.cumsum(self._lengths[order] + 3 * fim)
    starts = np.concatenate([[0], ends]) + self._start(number)
    return _Epoch(self._documents[order], starts, fim)

  def _shuffled(self, index: int) -> int:
    number, place = divmod(index, self._block)
    with self._lock:
      if number not in self._blocks:
        while len(self._blocks) >= 2:
          self._blocks.pop(next(iter(self._blocks)))
        draws = self._random(WINDOW, number, np.arange(self._block))
        self._blocks[number] = np.argsort(draws, kind="stable")
      return number * self._block + int(self._blocks[number][place])

  def _random(self, purpose: int, epoch: int, index: np.ndarray) -> np.ndarray:
    return random_bits(self._seed, purpose, epoch, index)


def _array(ids: list) -> np.ndarray:
  return np.array(ids, np.int32)
