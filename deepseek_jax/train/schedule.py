"""Learning rate, router-bias speed, MTP weight and batch size as functions of tokens.

DeepSeek-V3 report, section 4.2; DeepSeek-V2 report, section 3.1.2. Plain Python: the
step receives the values as scalars, so a schedule never recompiles it.
"""

import dataclasses
import math

from deepseek_jax.config import Pieces, TrainConfig


def piecewise(pieces: Pieces, tokens: float) -> float:
  """The value of a schedule (see `config.Piece`) once `tokens` have been seen."""
  start, value = 0.0, 0.0
  for until, shape, target in pieces:
    if tokens <= until:
      if shape == "constant" or until == start:
        return target
      done = (tokens - start) / (until - start)
      if shape == "cosine":
        done = 0.5 - 0.5 * math.cos(math.pi * done)
      return value + (target - value) * done
    start, value = until, target
  return value


@dataclasses.dataclass(frozen=True)
class Values:
  learning_rate: float
  bias_update_rate: float
  mtp_weight: float
  batch_size: int  # sequences


class Recipe:
  """The schedules of a run.

  Args:
    train: its settings.
    rows: sequences of one micro-batch over all devices; batch sizes are multiples.
  """

  def __init__(self, train: TrainConfig, rows: int = 1):
    self.train, self.rows = train, rows

  def at(self, tokens: float) -> Values:
    """What applies to the step that begins when `tokens` have been seen.

    The learning rate is that at the step's end, so the first step's is not zero.
    """
    t, s = self.train, self.train.schedule
    batch = t.batch_size * piecewise(s.batch_size, self._recipe_tokens(tokens))
    batch = max(self.rows, round(batch / self.rows) * self.rows)
    now = self._recipe_tokens(tokens)
    after = self._recipe_tokens(tokens + batch * t.seq_len)
    return Values(
      learning_rate=t.learning_rate * piecewise(s.learning_rate, after),
      bias_update_rate=t.bias_update_rate * piecewise(s.bias_update_rate, now),
      mtp_weight=piecewise(s.mtp_weight, now),
      batch_size=batch,
    )

  def _recipe_tokens(self, tokens: float) -> float:
    s = self.train.schedule
    if not s.fit_to_run:
      return tokens
    t = self.train
    return tokens * s.total_tokens / (t.steps * t.batch_size * t.seq_len)
