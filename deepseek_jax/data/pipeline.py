"""`make_data`: from a config to iterators over packed samples.

grain carries the iteration: its state (`get_state`, `set_state`) is the number of
samples taken, since a sample is a function of its index (`packing.py`).
"""

from dataclasses import dataclass
from pathlib import Path

import grain
import jax

from deepseek_jax.config import Config
from deepseek_jax.data.corpus import Corpus, load_corpus
from deepseek_jax.data.packing import PackedSource, split_documents
from deepseek_jax.data.sources import Documents
from deepseek_jax.data.tokenizer import Tokenizer, prepare_tokenizer
from deepseek_jax.processes import first_alone


@dataclass(frozen=True)
class Data:
  """What `make_data` makes.

  Attributes:
    tokenizer: the run's tokenizer, also in workdir/tokenizer.json.
    train: endless iterator over this process's samples {'tokens': int32 [T + 1]},
      with 'segments' if `data.mask_documents`; `get_state()` is JSON-able.
    bytes_per_token: UTF-8 bytes of validation text (of training text, if there is no
      validation) per token, special tokens counted as tokens: mean loss / ln 2 /
      bytes_per_token are bits per byte.
    epoch_tokens: training tokens of an epoch, over all processes.
    validation_samples: samples of this process's validation iterator.
  """

  tokenizer: Tokenizer
  train: grain.DatasetIterator
  bytes_per_token: float
  epoch_tokens: int
  validation_samples: int
  _validation: grain.IterDataset | None

  def validation(self) -> grain.DatasetIterator:
    """A fresh, finite iterator over the validation documents: fixed order, no FIM.

    Empty with `data.validation_fraction=0`. Every process has equally many samples.
    """
    if self._validation is None:
      return iter(grain.MapDataset.source([]).to_iter_dataset())  # pyright: ignore
    return iter(self._validation)


def make_data(
  config: Config,
  workdir: str | Path,
  process_index: int | None = None,
  process_count: int | None = None,
) -> Data:
  """Reads, tokenises (once; then from workdir/data) and packs what `config` names.

  Process p of P takes samples p, p + P, ... of one order, which depends on the data,
  `config.seed` and `train.seq_len` only, and reads only their text. Process numbers
  default to JAX's. All processes share `workdir`; the first one prepares it while the
  others wait.

  Raises:
    FileNotFoundError, ValueError: one line that names the setting or file at fault.
  """
  data, seq_len, workdir = config.data, config.train.seq_len, Path(workdir)
  process = jax.process_index() if process_index is None else process_index
  processes = jax.process_count() if process_count is None else process_count
  if not data.tokenizer and data.tokenizer_vocab > config.model.vocab_size:
    raise ValueError(
      f"data.tokenizer_vocab={data.tokenizer_vocab} exceeds model.vocab_size="
      f"{config.model.vocab_size}: lower the former or raise the latter"
    )
  documents = Documents(data.path, data.text_key, data.max_bytes)
  with first_alone("data"):
    tokenizer, corpus = _prepare(config, documents, workdir, process)
  training, held_out = split_documents(
    corpus, data.validation_fraction, config.seed, seq_len
  )
  train = PackedSource(
    corpus,
    training,
    tokenizer,
    seq_len,
    seed=config.seed,
    fim_rate=data.fim_rate,
    shuffle=data.shuffle,
    segments=data.mask_documents,
  )
  measured, validation, n_samples = training, None, 0
  if len(held_out):
    source = PackedSource(
      corpus,
      held_out,
      tokenizer,
      seq_len,
      shuffle=False,
      segments=data.mask_documents,
      endless=False,
    )
    n_samples = len(source) // processes
    validation = _iterate(source, process, processes, data.workers, n_samples)
    measured = held_out
  return Data(
    tokenizer=tokenizer,
    train=iter(_iterate(train, process, processes, data.workers)),
    bytes_per_token=_bytes_per_token(corpus, measured, tokenizer),
    epoch_tokens=train.epoch_tokens,
    validation_samples=n_samples,
    _validation=validation,
  )


def _prepare(
  config: Config, documents: Documents, workdir: Path, process: int
) -> tuple[Tokenizer, Corpus]:
  """The tokenizer and the tokens: made by process 0, opened by those after it."""
  data = config.data
  if jax.process_index() and not (workdir / "tokenizer.json").exists():
    raise ValueError(
      f"{workdir} is not the folder that process 0 writes to: give all processes a "
      "workdir on a file system that they share"
    )
  tokenizer = prepare_tokenizer(
    data.tokenizer, documents, data.tokenizer_vocab, config.seed, workdir
  )
  if tokenizer.vocab_size > config.model.vocab_size:
    raise ValueError(
      f"{tokenizer.name} has {tokenizer.vocab_size} entries, more than "
      f"model.vocab_size={config.model.vocab_size}: raise the latter"
    )
  return tokenizer, load_corpus(documents, tokenizer, workdir / "data", process)


def _iterate(
  source: PackedSource, process: int, processes: int, workers: int, n: int | None = None
) -> grain.IterDataset:
  """Samples process, process + processes, ... of `source`, `n` at most."""
  mine = grain.MapDataset.source(source)[process::processes]
  if n is not None:
    mine = mine[:n]
  options = grain.ReadOptions(
    num_threads=workers, prefetch_buffer_size=64 if workers else 0
  )
  return mine.to_iter_dataset(options)


def _bytes_per_token(corpus: Corpus, documents, tokenizer: Tokenizer) -> float:
  added = 1 if tokenizer.bos is None else 2
  tokens = int((corpus.lengths[documents] + added).sum())
  return int(corpus.sizes[documents].sum()) / tokens
