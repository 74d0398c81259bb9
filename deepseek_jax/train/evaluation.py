"""Validation loss and bits per byte: the same sequences each time, on any mesh."""

import math
from typing import Any

import jax

from deepseek_jax.config import Config
from deepseek_jax.data.pipeline import Data
from deepseek_jax.processes import compile_together
from deepseek_jax.train.batches import rows_of_micro_batch, validation_batch
from deepseek_jax.train.step import TrainState, make_eval_step


class Evaluation:
  """Call it with a state. The batch and the programs are made once, when needed."""

  def __init__(self, config: Config, mesh: jax.sharding.Mesh, data: Data):
    self._config, self._mesh = config, mesh
    self._bytes_per_token = data.bytes_per_token
    size = config.train.eval_batches * config.train.batch_size
    rows = rows_of_micro_batch(config, mesh)
    self._batch = validation_batch(data.validation(), size, rows, mesh)
    self._programs: dict[float, Any] = {}

  def __call__(self, state: TrainState, capacity: int = 0) -> dict[str, float]:
    """Mean loss of a validation token in nats, the MTP part, and bits per byte.

    `capacity` is the index into `train.capacities` to begin with. Empty without
    validation documents.
    """
    if self._batch is None:
      return {}
    found = self._run(state, capacity)
    loss = float(found["loss"])
    return {
      "validation_loss": loss,
      "validation_mtp_loss": float(found["mtp_loss"]),
      "bits_per_byte": loss / math.log(2) / self._bytes_per_token,
    }

  def _run(self, state: TrainState, capacity: int) -> dict[str, Any]:
    """At the first capacity that does not overflow; the last one never does."""
    bound = self._config.train.capacities[capacity]
    if bound not in self._programs:
      program = make_eval_step(self._config, self._mesh, bound)
      compile_together("evaluation", program, state, self._batch)
      self._programs[bound] = program
    found = jax.device_get(self._programs[bound](state, self._batch))
    return self._run(state, capacity + 1) if found["overflow"] else found
