"""From single sequences to global batches on the devices.

Process p of P draws every P-th sequence, so micro-batches hold the same sequences
whatever the number of processes and devices; only their order inside may differ.
"""

import logging
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.config import Config
from deepseek_jax.mesh import BATCH_AXES
from deepseek_jax.train.step import batch_sharding

log = logging.getLogger("deepseek_jax")

Sample = dict[str, np.ndarray]  # tokens [T+1], perhaps segments [T+1]


def rows_of_micro_batch(config: Config, mesh: Mesh) -> int:
  """Sequences that all devices together take at once.

  Raises:
    ValueError: processes cannot share them evenly.
  """
  devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  rows = config.train.micro_batch_size * devices
  processes = jax.process_count()
  if rows % processes:
    raise ValueError(
      f"{rows} rows of a micro-batch (train.micro_batch_size="
      f"{config.train.micro_batch_size} a device) do not divide among {processes} "
      "processes: raise train.micro_batch_size"
    )
  return rows


def next_batch(
  samples: Iterator[Sample], size: int, rows: int, mesh: Mesh
) -> dict[str, jax.Array]:
  """A global batch of `size` sequences as arrays [size // rows, rows, T+1]."""
  local = [next(samples) for _ in range(size // jax.process_count())]
  return _place(local, size // rows, mesh)


def validation_batch(
  samples: Iterator[Sample], size: int, rows: int, mesh: Mesh
) -> dict[str, jax.Array] | None:
  """At most `size` sequences, in whole micro-batches; None if there are none.

  Fewer sequences than one micro-batch are repeated to fill it. All processes must
  have equally many.
  """
  here = rows // jax.process_count()
  local = [sample for _, sample in zip(range(size // jax.process_count()), samples)]
  micros = len(local) // here
  if micros:
    return _place(local[: micros * here], micros, mesh)
  if not local:
    return None
  log.warning(
    "validation has %d sequences only, repeated to fill %d rows", len(local), rows
  )
  return _place([local[i % len(local)] for i in range(here)], 1, mesh)


def _place(local: list[Sample], micros: int, mesh: Mesh) -> dict[str, Any]:
  sharding = batch_sharding(mesh)
  stacked = {key: np.stack([sample[key] for sample in local]) for key in local[0]}
  return {
    key: jax.make_array_from_process_local_data(
      sharding, value.astype(np.int32).reshape(micros, -1, value.shape[-1])
    )
    for key, value in stacked.items()
  }
