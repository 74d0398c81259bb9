"""What a run reports: metrics.jsonl, TensorBoard events, MaxVio, FLOPs, MFU.

Everything here is on the host; counts and scalars are summed over devices inside the
step. MaxVio is the measure of the loss-free balancing paper (2408.15664), section 4.1:
(largest load - mean load) / mean load, of one layer, over the batch.

FLOP convention, as in the ISCA paper on DeepSeek-V3 (2505.09343), table 2, whose
250 GFLOP a token at 4,096 it reproduces: 6 x active parameters without the input
embedding, plus 3 x the forward pass of causal attention (half of the full matrix).
MTP modules and recomputation are not counted.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.config import MeshConfig, ModelConfig
from deepseek_jax.mesh import EXPERT_AXES

# Dense BF16 peak of one device by `jax.Device.device_kind`, in FLOP/s.
PEAK_FLOPS = {
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "TPU v5p": 459e12,
  "TPU v5": 459e12,  # how JAX names v5p
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 2307e12,
  "TPU v7": 2307e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Dense BF16 peak of a device in FLOP/s; None where we know none (CPUs)."""
  if device_kind.startswith("TPU v5 lite"):
    return None
  known = [kind for kind in PEAK_FLOPS if device_kind.startswith(kind)]
  return PEAK_FLOPS[max(known, key=len)] if known else None


def active_parameters(model: ModelConfig) -> int:
  """Parameters that one token passes through, without embedding and MTP."""
  heads, dim = model.n_heads, model.dim
  if model.kv_lora_rank:
    attention = dim * (model.kv_lora_rank + model.qk_rope_head_dim)
    attention += model.kv_lora_rank * (
      1 + heads * (model.qk_nope_head_dim + model.v_head_dim)
    )
  else:
    attention = dim * heads * (model.qk_head_dim + model.v_head_dim)
  if model.q_lora_rank:
    attention += model.q_lora_rank * (dim + 1 + heads * model.qk_head_dim)
  else:
    attention += dim * heads * model.qk_head_dim
  attention += heads * model.v_head_dim * dim
  experts = model.n_activated_experts + model.n_shared_experts
  moe = dim * model.n_routed_experts + experts * 3 * dim * model.moe_inter_dim
  dense = 3 * dim * model.inter_dim
  return (
    model.n_layers * (attention + 2 * dim)
    + model.n_dense_layers * dense
    + model.n_moe_layers * moe
    + dim
    + dim * model.vocab_size
  )


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
  """Training FLOPs of one token in sequences of `seq_len` (module docstring)."""
  widths = model.qk_head_dim + model.v_head_dim
  attention = model.n_layers * model.n_heads * 2 * seq_len * widths / 2
  return 6 * active_parameters(model) + 3 * attention


def max_violation(counts_LE: np.ndarray) -> list[float]:
  """MaxVio of each layer: (largest load - mean) / mean; 0 for an unused layer."""
  counts = np.asarray(counts_LE, np.float64)
  mean = counts.mean(axis=-1)
  largest = counts.max(axis=-1, initial=0)
  return [float((m - a) / a) if a else 0.0 for m, a in zip(largest, mean)]


def copies_per_token(mesh: MeshConfig, copies_LS: np.ndarray) -> dict[str, float]:
  """Of each axis that splits experts, how often a token is sent along it.

  Args:
    copies_LS: copies of a token by MoE layer and axis, as the step reports them.

  Returns:
    The mean over layers by name of the axis; a rank's copies to itself count.
  """
  axes = [axis for axis in EXPERT_AXES if getattr(mesh, axis) > 1]
  means = np.asarray(copies_LS, np.float64).mean(axis=0) if len(copies_LS) else []
  return {axis: float(mean) for axis, mean in zip(axes, means)}


class Speed:
  """Tokens a second of training, over the last steps without a compilation."""

  def __init__(self):
    self._recent: deque[tuple[int, float]] = deque(maxlen=10)
    self.pause()

  def pause(self) -> None:
    """What came before, since the last step, was not training."""
    self._last = time.perf_counter()

  def measure(self, tokens: int, compiled: bool) -> tuple[float, float]:
    """A step has ended: its (or the recent) tokens a second, and its seconds."""
    now = time.perf_counter()
    seconds, self._last = now - self._last, now
    if not compiled:
      self._recent.append((tokens, seconds))
    recent = [(tokens, seconds)] if compiled else self._recent
    return sum(n for n, _ in recent) / sum(s for _, s in recent), seconds


class MetricsLog:
  """Appends one JSON object a step to `metrics.jsonl`, and TensorBoard events.

  Opening it keeps the lines up to `last_step`, what the restored checkpoint knows,
  and drops the later ones: those steps are about to be done again.
  """

  def __init__(self, workdir: str | Path, last_step: int):
    self.path = Path(workdir) / "metrics.jsonl"
    _truncate(self.path, last_step)
    self._file = self.path.open("a")
    self._events = _open_events(Path(workdir), last_step)

  def write(self, record: dict[str, Any]) -> None:
    """Writes a record with a `step`; NaN and infinity become null."""
    self._file.write(json.dumps(_strict(record), allow_nan=False) + "\n")
    self._file.flush()
    if self._events:
      _write_event(self._events, record)

  def sync(self) -> None:
    """Puts all lines on disk, as a checkpoint of the same step is about to be."""
    self._file.flush()
    os.fsync(self._file.fileno())
    if self._events:
      self._events.flush()

  def close(self) -> None:
    self._file.close()
    if self._events:
      self._events.close()


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
  """All records of a workdir's metrics.jsonl, in order; [] where there is none."""
  path = Path(workdir) / "metrics.jsonl"
  if not path.exists():
    return []
  return list(_records(path.read_text().splitlines()))


def _records(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
  """Parses lines up to the first broken one, which a kill may have left last."""
  for line in lines:
    try:
      record = json.loads(line)
    except ValueError:
      return
    yield record


def _truncate(path: Path, last_step: int) -> None:
  if not path.exists():
    return
  kept = [r for r in _records(path.read_text().splitlines()) if r["step"] <= last_step]
  temporary = path.with_suffix(".part")
  temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
  temporary.rename(path)


def _strict(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _strict(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_strict(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _open_events(workdir: Path, last_step: int) -> Any:
  """A TensorBoard event writer, or None where TensorBoard is not installed."""
  try:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore
    from tensorboard.summary.writer.event_file_writer import EventFileWriter  # pyright: ignore
  except ImportError:
    return None
  writer = EventFileWriter(str(workdir / "tensorboard"))
  if last_step:  # tells TensorBoard to forget the steps that are done again
    log = SessionLog(status=SessionLog.START)
    writer.add_event(Event(step=last_step + 1, session_log=log))
  return writer


def _write_event(writer: Any, record: dict[str, Any]) -> None:
  from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore
  from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore

  values = [
    Summary.Value(tag=f"train/{name}", simple_value=float(value))
    for name, value in record.items()
    if isinstance(value, int | float) and name != "step"
  ]
  writer.add_event(Event(step=record["step"], summary=Summary(value=values)))
