"""Several processes, one run: how they meet, and how all end when one of them dies.

`jax.distributed` does the work. It finds the cluster (SLURM, Open MPI, Kubernetes,
GKE and Cloud TPU) if nothing is said; its coordination service, which lives in process
0, introduces the processes to each other and watches their heartbeats. Added here are
one line for a mistake (meeting.py), and an end within a time-out. When a process dies,

- a collective of the others fails at once (Gloo, on CPUs): an exception, `is_loss`;
- or it waits forever (NCCL, TPU): after `peer_timeout` seconds without a heartbeat the
  service tells all processes, and JAX ends them from C++;
- or it was process 0, and the service with it: JAX ends the others at once, from C++.

Each time the others end with one line (last_words.py) and a code other than 0, and the
same commands continue the run from the last whole checkpoint.

Left out: going on with fewer processes.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed  # its client has no public name

from deepseek_jax.last_words import LastWords
from deepseek_jax.meeting import Place, meet

log = logging.getLogger("deepseek_jax")

JOIN_TIMEOUT, PEER_TIMEOUT = 300, 100  # seconds
_AGAIN = (
  "give all processes their commands again, "
  "they continue from the last whole checkpoint"
)
# In errors that come of a lost process: of Gloo, NCCL and the coordination service.
_SIGNS_OF_LOSS = (
  "gloo",
  "nccl",
  "connection reset",
  "connection closed",
  "coordination service",
  "heartbeat",
  "barrier",
  "preempted",
)


class Group:
  """This process among the others, from joining them to leaving."""

  def __init__(
    self,
    place: Place | None = None,
    join_timeout: int = JOIN_TIMEOUT,
    peer_timeout: int = PEER_TIMEOUT,
  ):
    """Joins the others; to be called before JAX looks for devices.

    Args:
      place: None to find it in the environment, as `jax.distributed.initialize` does.
      join_timeout: seconds to wait until all processes have come.
      peer_timeout: seconds of silence after which a process counts as dead.

    Raises:
      ValueError: there is no cluster, or not all processes came: one line.
    """
    if place:
      meet(place, join_timeout)
    self._words = LastWords(
      f"not all processes could be joined within {join_timeout} s (JAX's lines above "
      "say more): start all of them, and see that they reach the host of process 0"
    )
    try:
      _initialize(place, join_timeout, peer_timeout)
    except (ValueError, RuntimeError, OSError) as error:
      self._words.close()
      raise ValueError(_why_not_joined(place, error)) from error
    state = distributed.global_state
    self.process = state.process_id
    self._name = f"process {state.process_id} of {state.num_processes}"
    self._words.set(
      f"{self._name} ended because another one died or was not heard of for "
      f"{peer_timeout} s, unless it was itself killed: {_AGAIN}"
    )

  def value_of_first(self, name: str, value: str) -> str:
    """The `value` that process 0 gave; every process calls it once for a name."""
    client, key = _client(), f"deepseek_jax/{name}"
    if self.process == 0:
      client.key_value_set(key, value)
    return client.blocking_key_value_get(key, JOIN_TIMEOUT * 1000)

  def shared_fault(self, fault: str | None) -> str | None:
    """A fault that some process has found, told to all; every process calls it once."""
    client, folder = _client(), "deepseek_jax/faults/"
    if fault:
      client.key_value_set(f"{folder}{self.process}", fault)
    _wait("faults")
    return min((line for _, line in client.key_value_dir_get(folder)), default=None)

  def explain_loss(self, error: BaseException) -> str | None:
    """One line about an error that a lost process has caused; None about others."""
    if not is_loss(error):
      return None
    reason = " ".join(str(error).split())
    return f"{self._name} lost another one ({reason[:200]}): {_AGAIN}"

  def leave(self) -> None:
    """Waits for the others, who have done their work as well."""
    jax.distributed.shutdown()
    self._words.close()

  def abandon(self, line: str, code: int, wait: int = 0) -> NoReturn:
    """Ends this process without its share in the run's end; `line` is its last word.

    For `wait` seconds it stays if the others do not end as well, and process 0 goes
    last: with it goes the service, and they could not say what they have to say.
    """
    try:
      self._words.set(line)
    except OSError:  # the companion is gone
      print(f"error: {line}", file=sys.stderr)
    if wait:
      with contextlib.suppress(RuntimeError):
        _client().wait_at_barrier("deepseek_jax/abandoned", wait * 1000)
        time.sleep(0 if self.process else 1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what runs at exit would wait for all processes


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
  """A block that process 0 runs alone and the others after it, once for a name."""
  if jax.process_index() > 0:
    _wait(name)
  yield
  if jax.process_index() == 0:
    _wait(name)


def compile_together(name: str, program: Any, *args: Any, **static: Any) -> None:
  """Compiles a jitted `program` in all processes before any of them calls it.

  Compilers need not take equally long in all of them, and Gloo, through which CPUs
  communicate, gives up after 30 seconds. The call that follows compiles nothing.
  """
  if jax.process_count() > 1:
    program.lower(*args, **static).compile()
    _wait(f"compiled {name}")


def is_loss(error: BaseException | None) -> bool:
  """Whether an error, or what caused it, says that another process is gone."""
  while error is not None:
    if isinstance(error, RuntimeError | TimeoutError):
      text = str(error).lower()
      if any(sign in text for sign in _SIGNS_OF_LOSS):
        return True
    error = error.__cause__ or error.__context__
  return False


def _initialize(place: Place | None, join_timeout: int, peer_timeout: int) -> None:
  timeouts: dict[str, Any] = {
    "initialization_timeout": join_timeout,
    "heartbeat_timeout_seconds": peer_timeout,
    "shutdown_timeout_seconds": peer_timeout,
  }
  if place is None:
    jax.distributed.initialize(**timeouts)
    return
  jax.distributed.initialize(
    place.coordinator,
    place.processes,
    place.process,
    # Without it SLURM's and Open MPI's numbers would still choose one device for us.
    cluster_detection_method="deactivate",
    **timeouts,
  )


def _why_not_joined(place: Place | None, error: Exception) -> str:
  reason = " ".join(str(error).split())
  if place is None:
    return (
      f"no cluster could be joined ({reason}): SLURM, Open MPI, Kubernetes, GKE and "
      "Cloud TPU are found by themselves; elsewhere give coordinator, processes and "
      "process"
    )
  return f"coordinator={place.coordinator} cannot be used ({reason})"


def _client() -> Any:
  return distributed.global_state.client


def _wait(name: str) -> None:
  """Until all processes are here."""
  if client := _client():
    client.wait_at_barrier(f"deepseek_jax/{name}", 24 * 3600 * 1000)
