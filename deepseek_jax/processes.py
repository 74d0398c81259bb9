"""Several processes, one run: how they meet, and how all end when one of them dies.

`jax.distributed` does the work. It finds the cluster (SLURM, Open MPI, Kubernetes,
GKE and Cloud TPU) if nothing is said; its coordination service, which lives in process
0, introduces the processes to each other and watches their heartbeats. Added here are
one line for every mistake, and an end within a time-out. When a process dies,

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
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
from jax._src import distributed  # its client has no public name

from deepseek_jax.last_words import LastWords

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


@dataclass(frozen=True)
class Place:
  """Which process this is, of how many, and where process 0 can be reached.

  Raises:
    ValueError: one line that names the flag at fault.
  """

  coordinator: str  # HOST:PORT, a free port of the host of process 0
  processes: int
  process: int  # from 0

  def __post_init__(self):
    host, _, port = self.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
      raise ValueError(
        f"coordinator={self.coordinator!r} must be HOST:PORT of process 0, as in "
        "10.0.0.1:8476"
      )
    if self.processes < 1:
      raise ValueError(f"processes={self.processes} must be at least 1")
    if not 0 <= self.process < self.processes:
      raise ValueError(
        f"process={self.process} must be one of 0 to {self.processes - 1}, as "
        f"processes={self.processes}"
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
    self.process = place.process if place else 0
    where = f" at {place.coordinator}" if place else ""
    who = f"process {place.process} of {place.processes}" if place else "this process"
    missing = (
      f"{who} did not meet all others{where} within {join_timeout} s: start all of "
      "them, with the same coordinator and number of processes, and see that the "
      "coordinator's host and port can be reached"
    )
    self._words = LastWords(missing)
    try:
      if place and place.process:
        _wait_for_port(place.coordinator, join_timeout)
      _initialize(place, join_timeout, peer_timeout)
    except TimeoutError as error:
      self._words.close()
      raise ValueError(missing) from error
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

  def abandon(self, code: int, wait: int = 0) -> NoReturn:
    """Ends this process, which has said why, without its share in the run's end.

    For `wait` seconds it stays if the others do not end as well: with process 0 the
    service goes, and they could not say what they have to say.
    """
    self._words.close()
    if wait:
      with contextlib.suppress(RuntimeError):
        _client().wait_at_barrier("deepseek_jax/abandoned", wait * 1000)
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


def _wait_for_port(address: str, seconds: int) -> None:
  """Returns once something listens there: JAX itself would end us where nothing does.

  Raises:
    TimeoutError: nothing came to listen in time.
    OSError: the host has no address.
  """
  host, _, port = address.rpartition(":")
  deadline = time.monotonic() + seconds
  while True:
    left = deadline - time.monotonic()
    try:
      with socket.create_connection((host.strip("[]"), int(port)), max(left, 1)):
        return
    except socket.gaierror:
      raise
    except OSError as error:
      if left <= 0:
        raise TimeoutError from error
    time.sleep(0.2)


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
