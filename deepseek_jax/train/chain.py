"""Steps dispatched one ahead of what is known, with the result of one at a time.

The host reads the metrics of step k only after it has dispatched step k+1, so the
device never waits for the host. Whether k overflowed is thus unknown when k+1 is
dispatched. Each step therefore receives, on the device, the overflow flag of the step
before it (`Scalars.blocked`) and counts it as its own: after an overflow no later step
changes the state. When the host learns of it, it dispatches the same batches again, in
their order, at a larger capacity. So the state, and every decision below, is exactly
that of a loop that waits for each step, wherever one stops to look (to evaluate, to
save): runs are deterministic and resume bit for bit.

A step that is not finite does not block: the next one starts from the unchanged state,
as it would after waiting.

Capacity: one of `train.capacities`. An overflow moves to the next one that the counts
allow; after `STEPS_BEFORE_LOWER` steps the one below is tried again. Both depend on
step numbers and results only, never on time.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.mesh import EXPERT_AXES
from deepseek_jax.processes import compile_together
from deepseek_jax.train.schedule import Values
from deepseek_jax.train.step import Scalars, TrainState

log = logging.getLogger("deepseek_jax")

STEPS_BEFORE_LOWER = 200


@dataclass
class Step:
  """One optimizer step: what goes in and, once it is settled, what came out."""

  number: int  # of the global batch, from 1
  batch: dict[str, jax.Array]
  values: Values
  tokens: int  # of this batch
  tokens_seen: int  # with this batch
  capacity: int = 0  # index into train.capacities
  retries: int = 0
  compiled: bool = False  # whether its time contains a compilation
  metrics: Any = None
  weights: Any = None  # a copy for the moving average, when one is due


class Chain:
  """The state of training and the steps under way on it."""

  def __init__(
    self,
    state: TrainState,
    mesh: Mesh,
    capacities: tuple[float, ...],
    compile_step: Callable[[float], Callable],
    copy_weights: Callable[[TrainState, int], Any],
    capacity: int = 0,
    raised_at: int = 0,
  ):
    """
    Args:
      compile_step: makes the jitted step of a capacity; called when first needed.
      copy_weights: called with the state after a step and its number; its result
        is kept as `Step.weights`.
      capacity, raised_at: from the checkpoint; see the properties.
    """
    self.state = state
    self.capacity = capacity  # index in use
    self.raised_at = raised_at  # step at which it last changed
    self._ranks = math.prod(mesh.shape[axis] for axis in EXPERT_AXES)
    self._capacities = capacities
    self._compile, self._compiled = compile_step, {}
    self._copy_weights = copy_weights
    self._under_way: deque[Step] = deque()
    self._free = jax.device_put(np.False_, NamedSharding(mesh, P()))

  def push(self, step: Step) -> None:
    """Dispatches a step after those under way."""
    self._dispatch(step, self._under_way[-1] if self._under_way else None)
    self._under_way.append(step)

  def settle(self, leave: int) -> Iterator[Step]:
    """Yields all but the newest `leave` steps with their metrics, each when it is done.

    Steps that overflowed have been repeated until they did not.
    """
    while len(self._under_way) > leave:
      step = self._under_way[0]
      step.metrics = jax.device_get(step.metrics)
      if step.metrics["overflow"]:
        self._raise_capacity(step)
        self._dispatch_again()
        continue
      yield self._under_way.popleft()

  def _dispatch(self, step: Step, before: Step | None) -> None:
    if self.capacity and step.number - self.raised_at >= STEPS_BEFORE_LOWER:
      self.capacity, self.raised_at = self.capacity - 1, step.number
    step.capacity = self.capacity
    scalars = Scalars(
      learning_rate=np.float32(step.values.learning_rate),
      bias_update_rate=np.float32(step.values.bias_update_rate),
      mtp_weight=np.float32(step.values.mtp_weight),
      blocked=before.metrics["overflow"] if before else self._free,
    )
    if step.capacity not in self._compiled:
      program = self._compile(self._capacities[step.capacity])
      compile_together("step", program, self.state, step.batch, scalars)
      self._compiled[step.capacity] = program
      step.compiled = True
    run = self._compiled[step.capacity]
    self.state, step.metrics = run(self.state, step.batch, scalars)
    step.weights = self._copy_weights(self.state, step.number)

  def _dispatch_again(self) -> None:
    before = None
    for step in self._under_way:
      self._dispatch(step, before)
      before = step

  def _raise_capacity(self, step: Step) -> None:
    """After the overflow of `step`, whatever was decided for those behind it."""
    if step.capacity + 1 >= len(self._capacities):
      raise RuntimeError(
        f"step {step.number} overflowed at capacity "
        f"{self._capacities[step.capacity]}, which must not happen"
      )
    least = _least_capacity(step.metrics["counts"], self._ranks)
    self.capacity = next(
      index
      for index in range(step.capacity + 1, len(self._capacities))
      if self._capacities[index] >= least or index + 1 == len(self._capacities)
    )
    self.raised_at = step.number
    step.retries += 1
    log.warning(
      "step %d: expert dispatch overflowed capacity %g, same batch again at %g",
      step.number,
      self._capacities[step.capacity],
      self._capacities[self.capacity],
    )


def _least_capacity(counts_LE: np.ndarray, ranks: int) -> float:
  """A bound that some rank exceeded for certain: its mean load over the batch."""
  counts = np.asarray(counts_LE, np.float64)
  load = counts.reshape(len(counts), ranks, counts.shape[1] // ranks).sum(-1)
  mean = np.maximum(load.mean(axis=1), 1e-9)
  return float((load.max(axis=1) / mean).max(initial=1.0))
