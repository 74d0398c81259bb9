"""The training loop: data, steps, metrics, checkpoints, and how they stop and resume.

Order of things. Step k takes the k-th global batch, whether or not it is applied, so
the schedules and the data depend on k alone; `TrainState.step` counts applied updates.
Steps are dispatched one ahead (chain.py). Wherever the run looks at its state, at an
evaluation, a checkpoint, a stop, all steps are settled first, so a checkpoint of step
k holds the state after k, the position of the data after k, and metrics.jsonl has the
lines up to k and is on disk. On resume later lines are dropped and done again: the
run continues bit for bit as if never stopped (on the same mesh; to rounding on
another).

A step whose loss or gradient is not finite is skipped and counted; after
`train.max_bad_steps` in a row the run stops with a checkpoint (FloatingPointError).
"""

import dataclasses
import functools
import logging
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from deepseek_jax.config import Config
from deepseek_jax.data.pipeline import Data, make_data
from deepseek_jax.io import workdir as home
from deepseek_jax.io.checkpoint import Checkpoints, check_space, tree_bytes
from deepseek_jax.io.weights import restore_start
from deepseek_jax.mesh import make_mesh
from deepseek_jax.processes import is_loss
from deepseek_jax.train import metrics as reporting
from deepseek_jax.train.batches import next_batch, rows_of_micro_batch
from deepseek_jax.train.chain import Chain, Step
from deepseek_jax.train.ema import Ema, device_copy
from deepseek_jax.train.evaluation import Evaluation
from deepseek_jax.train.finish import finish
from deepseek_jax.train.interrupt import Interrupt
from deepseek_jax.train.schedule import Recipe
from deepseek_jax.train.step import (
  TrainState,
  abstract_state,
  init_state,
  make_train_step,
)

log = logging.getLogger("deepseek_jax")

_LOADS_KEPT = 50  # steps whose expert loads are averaged for the plot at the end


@dataclass
class Progress:
  """The counters that a checkpoint holds, besides the state and the data's position."""

  step: int = 0  # global batches taken
  tokens: int = 0  # of those batches
  skipped: int = 0  # steps that were not finite, in all
  bad_in_a_row: int = 0
  capacity: int = 0  # see chain.py
  raised_at: int = 0
  seconds: float = 0.0  # training time


@dataclass
class Run:
  """The parts of a run, put together by `begin`."""

  config: Config
  workdir: Path
  mesh: jax.sharding.Mesh
  data: Data
  checkpoints: Checkpoints
  chain: Chain
  progress: Progress
  ema: Ema | None
  log: reporting.MetricsLog | None  # of process 0 alone
  loads: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=_LOADS_KEPT))
  speed: reporting.Speed = field(default_factory=reporting.Speed)

  @property
  def state(self) -> TrainState:
    return self.chain.state

  @functools.cached_property
  def recipe(self) -> Recipe:
    return Recipe(self.config.train, self.rows)

  @functools.cached_property
  def rows(self) -> int:
    return rows_of_micro_batch(self.config, self.mesh)

  @functools.cached_property
  def flops_per_token(self) -> float:
    model, seq_len = self.config.model, self.config.train.seq_len
    return reporting.flops_per_token(model, seq_len)

  @functools.cached_property
  def evaluation(self) -> Evaluation:
    return Evaluation(self.config, self.mesh, self.data)


def train(
  config: Config,
  workdir: str | Path,
  devices: Sequence[Any] | None = None,
) -> None:
  """Trains as `config` says, from the newest checkpoint in `workdir` if there is one.

  Leaves checkpoints/, metrics.jsonl, plots/ and samples/ in `workdir`. Returns after
  the last step, or earlier after SIGTERM or Ctrl-C (with a checkpoint in both cases).

  Raises:
    ValueError, FileNotFoundError, OSError: one line for the user.
    FloatingPointError: too many steps in a row were not finite.
  """
  with Interrupt() as interrupt:
    run = begin(config, Path(workdir), devices)
    try:
      _steps(run, interrupt)
      if run.progress.bad_in_a_row >= config.train.max_bad_steps:
        raise FloatingPointError(_bad_steps(run))
      if run.progress.step < config.train.steps:
        log.info("%s; the same command continues", _where(run))
      else:
        finish(config, run.workdir, run.mesh, run.data, run.state, list(run.loads))
    finally:
      if not is_loss(sys.exception()):  # or it would wait for the lost process
        _close(run)


def _bad_steps(run: Run) -> str:
  return (
    f"{run.progress.bad_in_a_row} steps in a row (train.max_bad_steps="
    f"{run.config.train.max_bad_steps}) had a loss or gradient that is not finite: "
    f"{_where(run)}; a lower train.learning_rate is the usual mend"
  )


def _where(run: Run) -> str:
  step = run.progress.step
  if not step:
    return "stopped before the first step"
  return f"stopped at step {step} with a checkpoint in {run.checkpoints.directory}"


def begin(config: Config, workdir: Path, devices: Sequence[Any] | None = None) -> Run:
  """Prepares the data and the state, restored or fresh; `devices` None means all."""
  home.check(config, workdir)
  mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
  abstract = abstract_state(config, mesh)
  saved = tree_bytes(abstract)
  if config.train.ema_decay:
    saved += tree_bytes(_weights(abstract))
  check_space(workdir / "checkpoints", saved, config.checkpoint.keep)
  rows_of_micro_batch(config, mesh)
  data = make_data(config, workdir)
  checkpoints = Checkpoints(
    workdir / "checkpoints", config.checkpoint.keep, config.checkpoint.asynchronous
  )
  found = checkpoints.restore(
    vars(abstract), _weights(abstract) if config.train.ema_decay else None
  )
  if jax.process_index() == 0:
    home.claim(config, workdir)
  if found:
    state, progress = TrainState(**found.state), Progress(**found.loop["progress"])
    data.train.set_state(_data_position(found.loop))
    log.info("resumed from the checkpoint of step %d", progress.step)
  else:
    state, progress = init_state(config, mesh), Progress()
    if config.checkpoint.path:
      weights = restore_start(config, _weights(abstract))
      state = TrainState(**(vars(state) | _split(state, weights)))
      log.info("starts from the weights of %s", config.checkpoint.path)
  ema = None
  if config.train.ema_decay:
    decay = config.train.ema_decay**config.train.ema_every
    ema = Ema(decay, found.ema if found and found.ema else _weights(state))
  chain = Chain(
    state,
    mesh,
    config.train.capacities,
    functools.partial(make_train_step, config, mesh),
    functools.partial(_copy_if_due, config),
    progress.capacity,
    progress.raised_at,
  )
  lines = None
  if jax.process_index() == 0:
    lines = reporting.MetricsLog(workdir, progress.step)
  return Run(config, workdir, mesh, data, checkpoints, chain, progress, ema, lines)


def _steps(run: Run, interrupt: Interrupt) -> None:
  """Trains until the last step or a reason to stop, and saves."""
  train, progress = run.config.train, run.progress
  first = progress.step
  if first >= train.steps:
    log.info("step %d is done: a larger train.steps trains on", first)
    return
  bar = tqdm(
    total=train.steps,
    initial=progress.step,
    unit="step",
    disable=jax.process_index() != 0,
    dynamic_ncols=True,
    mininterval=0.5,
  )
  run.speed.pause()
  with bar:
    while progress.step < train.steps and not interrupt.requested(progress.step + 1):
      run.chain.push(_next_step(run))
      step = progress.step
      evaluated = step == train.steps or _is_due(train.eval_every, step)
      saved = step == train.steps or _is_due(run.config.checkpoint.every, step)
      _settle(run, bar, 0 if evaluated or saved else 1, evaluated)
      if progress.bad_in_a_row >= train.max_bad_steps:
        break
      if saved:
        _save(run)
    _settle(run, bar, 0, False)
    if progress.step > first:
      _save(run)


def _is_due(every: int, step: int) -> bool:
  return every > 0 and step % every == 0


def _next_step(run: Run) -> Step:
  """Draws the next batch and counts it."""
  progress = run.progress
  values = run.recipe.at(progress.tokens)
  batch = next_batch(run.data.train, values.batch_size, run.rows, run.mesh)
  tokens = values.batch_size * run.config.train.seq_len
  progress.step += 1
  progress.tokens += tokens
  return Step(progress.step, batch, values, tokens, progress.tokens)


def _settle(run: Run, bar: Any, leave: int, evaluated: bool) -> None:
  """Accounts for all steps but the newest `leave`; evaluates after the last one."""
  records = [_account(run, step) for step in run.chain.settle(leave)]
  if evaluated and records:
    records[-1] |= run.evaluation(run.state, run.chain.capacity)
    run.speed.pause()
  for record in records:
    bar.update(1)
    bar.set_postfix_str(
      f"loss {record['loss']:.3f}, MTP {record['mtp_loss']:.3f}, "
      f"{record['tokens_per_second']:,.0f} tokens/s",
      refresh=False,
    )
    due = _is_due(run.config.train.log_every, record["step"])
    if run.log and (due or "validation_loss" in record):
      run.log.write(record)


def _account(run: Run, step: Step) -> dict[str, Any]:
  """Counts a settled step, feeds the average, and makes its line of metrics."""
  progress, found = run.progress, step.metrics
  tokens_per_second, seconds = run.speed.measure(step.tokens, step.compiled)
  progress.seconds += seconds
  if found["finite"]:
    progress.bad_in_a_row = 0
  else:
    progress.bad_in_a_row += 1
    progress.skipped += 1
    log.warning(
      "step %d is not finite (loss %g, gradient norm %g) and was not applied: "
      "%d in a row",
      step.number,
      found["loss"],
      found["grad_norm"],
      progress.bad_in_a_row,
    )
  if run.ema and step.weights is not None:
    run.ema.update(step.weights)
  run.loads.append(found["counts"])
  record = _record(run.config, step) | {
    "tokens_per_second": tokens_per_second,
    "seconds": progress.seconds,
    "skipped": progress.skipped,
  }
  if peak := reporting.peak_flops(jax.devices()[0].device_kind):
    used = tokens_per_second * run.flops_per_token
    record["mfu"] = used / (peak * run.mesh.size)
  return record


def _record(config: Config, step: Step) -> dict[str, Any]:
  """What the step itself says; lists are by MoE layer, MTP's last."""
  found = step.metrics
  violations = reporting.max_violation(found["counts"])
  entropy = np.asarray(found["entropy"], np.float64).tolist()
  return {
    "step": step.number,
    "tokens": step.tokens_seen,
    "loss": float(found["loss"]),
    "mtp_loss": float(found["mtp_loss"]),
    "balance_loss": float(found["balance_loss"]),
    "grad_norm": float(found["grad_norm"]),
    "learning_rate": step.values.learning_rate,
    "bias_update_rate": step.values.bias_update_rate,
    "mtp_weight": step.values.mtp_weight,
    "batch_size": step.values.batch_size,
    "max_vio": float(np.mean(violations)) if violations else 0.0,
    "max_vio_layers": violations,
    "gate_entropy": float(np.mean(entropy)) if entropy else 0.0,
    "gate_entropy_layers": entropy,
    "capacity": config.train.capacities[step.capacity],
    "retries": step.retries,
    "copies_per_token": reporting.copies_per_token(config.mesh, found["copies"]),
    "applied": bool(found["applied"]),
  }


def _save(run: Run) -> None:
  """Saves the state after the last step; all steps must be settled."""
  progress = run.progress
  progress.capacity, progress.raised_at = run.chain.capacity, run.chain.raised_at
  if run.log:
    run.log.sync()
  loop = {
    "progress": dataclasses.asdict(progress),
    "data": run.data.train.get_state(),
    "processes": jax.process_count(),
  }
  average = run.ema.arrays() if run.ema else None
  run.checkpoints.save(progress.step, vars(run.state), loop, average)
  run.speed.pause()


def _data_position(loop: dict[str, Any]) -> Any:
  """The data iterator's state, for as many processes as there are now.

  Each process has taken its share of the same samples, so positions scale.
  """
  before, now = loop["processes"], jax.process_count()
  position = loop["data"]
  if before == now:
    return position
  return {key: value * before // now for key, value in position.items()}


def _weights(state: TrainState) -> dict[str, Any]:
  return {**state.params, **state.bias}


def _split(state: TrainState, weights: dict[str, Any]) -> dict[str, Any]:
  """Weights by path as the parts of the state that hold them."""
  return {
    "params": {path: weights[path] for path in state.params},
    "bias": {path: weights[path] for path in state.bias},
  }


def _copy_if_due(config: Config, state: TrainState, step: int) -> Any:
  due = config.train.ema_decay and step % config.train.ema_every == 0
  return device_copy(_weights(state)) if due else None


def _close(run: Run) -> None:
  if run.log:
    run.log.close()
  if run.ema:
    run.ema.close()
  run.checkpoints.close()
