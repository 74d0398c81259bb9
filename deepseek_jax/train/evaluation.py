"""Validation loss, bits per byte, loads: the same sequences always, on any mesh."""

import math
from typing import Any

import jax
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.data.pipeline import Data
from deepseek_jax.processes import compile_together
from deepseek_jax.train.batches import rows_of_micro_batch, validation_batch
from deepseek_jax.train.step import TrainState, make_eval_step


class Evaluation:
  """Call it with a state. The batch and the programs are made once, when needed."""

  def __init__(self, config: Config, mesh: jax.sharding.Mesh, data: Data):
    self._bytes_per_token = data.bytes_per_token
    size = config.train.eval_batches * config.train.batch_size
    rows = rows_of_micro_batch(config, mesh)
    self._batch = validation_batch(data.validation(), size, rows, mesh)
    self._measure = _Measure(config, mesh)

  def __call__(self, state: TrainState, capacity: int = 0) -> dict[str, float]:
    """Mean loss of a validation token in nats, the MTP part, and bits per byte.

    `capacity` is the index into `train.capacities` to begin with. Empty without
    validation documents.
    """
    if self._batch is None:
      return {}
    found = self._measure(state, self._batch, capacity)
    loss = float(found["loss"])
    return {
      "validation_loss": loss,
      "validation_mtp_loss": float(found["mtp_loss"]),
      "bits_per_byte": loss / math.log(2) / self._bytes_per_token,
    }


def measure_loads(
  config: Config, mesh: jax.sharding.Mesh, data: Data, state: TrainState, parts: int
) -> list[np.ndarray]:
  """Tokens that chose each expert, [layers, experts], in each of several parts.

  A part is the next `train.eval_batches` global batches of the validation data. MTP's
  layers are the last.

  Raises:
    ValueError: there is no validation data left for a part.
  """
  size = config.train.eval_batches * config.train.batch_size
  rows = rows_of_micro_batch(config, mesh)
  samples, measure = data.validation(), _Measure(config, mesh)
  batches = [validation_batch(samples, size, rows, mesh) for _ in range(parts)]
  if any(batch is None for batch in batches):
    raise ValueError(
      f"{data.validation_samples} validation sequences do not suffice for {parts} "
      f"parts of {size}: lower train.eval_batches={config.train.eval_batches} or "
      "raise data.validation_fraction"
    )
  return [measure(state, batch)["counts"] for batch in batches]


class _Measure:
  """The evaluation step at the first capacity that does not overflow."""

  def __init__(self, config: Config, mesh: jax.sharding.Mesh):
    self._config, self._mesh = config, mesh
    self._programs: dict[float, Any] = {}

  def __call__(self, state: TrainState, batch: Any, capacity: int = 0) -> Any:
    bound = self._config.train.capacities[capacity]
    if bound not in self._programs:
      program = make_eval_step(self._config, self._mesh, bound)
      compile_together("evaluation", program, state, batch)
      self._programs[bound] = program
    found = jax.device_get(self._programs[bound](state, batch))
    # The last capacity is infinite.
    return self(state, batch, capacity + 1) if found["overflow"] else found
