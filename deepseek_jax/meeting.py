"""The processes of a run meet once before JAX, so that mistakes are found in time.

JAX aborts, with a stack trace, where a process does not come or another is told another
number of processes. Here process 0 listens at the coordinator's port first. Every other
one says in a line of JSON which it is, and of how many; when all are there, or one is
impossible, process 0 answers all of them and leaves the port to JAX.
"""

import contextlib
import json
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_LONGEST = 1 << 12  # bytes of a line


@dataclass(frozen=True)
class Place:
  """Which process this is, of how many, and where process 0 can be reached.

  Raises:
    ValueError: one line that names the flag at fault.
  """

  coordinator: str  # HOST:PORT or [HOST]:PORT, a free port of the host of process 0
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

  @property
  def address(self) -> tuple[str, int]:
    host, _, port = self.coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def meet(place: Place, timeout: float) -> None:
  """Returns when all processes are here.

  Raises:
    ValueError: they are not, in `timeout` seconds, or do not fit together; one line.
  """
  deadline = time.monotonic() + timeout
  if place.process:
    _go(place, deadline, timeout)
  elif place.processes > 1:
    _wait(place.address[1], place.processes, deadline, timeout)


def _wait(port: int, processes: int, deadline: float, timeout: float) -> None:
  """Process 0: waits for the others and answers them."""
  try:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    listener = socket.create_server(
      ("", port), family=family, backlog=processes, dualstack_ipv6=both
    )
  except OSError as error:
    raise ValueError(
      f"process 0 cannot listen at port {port} ({error.strerror}): give all processes "
      "another port in --coordinator"
    ) from error
  with contextlib.ExitStack() as stack:
    stack.enter_context(listener)
    came: dict[int, socket.socket] = {}
    fault = None
    while len(came) < processes - 1 and not fault:
      listener.settimeout(max(deadline - time.monotonic(), 0.001))
      try:
        guest = stack.enter_context(listener.accept()[0])
      except TimeoutError:
        absent = [str(i) for i in range(1, processes) if i not in came]
        more = f" and {len(absent) - 9} more" if len(absent) > 9 else ""
        fault = (
          f"of {processes} processes {', '.join(absent[:9])}{more} did not come to "
          f"port {port} within {timeout:g} s: start them too"
        )
        break
      said = _receive(guest, 5)
      if said:  # another program's connection says nothing that we understand
        fault = _fault(said, processes, came)
        came[len(came) + 1 if fault else said["process"]] = guest
    _answer(list(came.values()), fault)
  if fault:
    raise ValueError(fault)


def _fault(said: dict[str, Any], processes: int, came: dict[int, Any]) -> str | None:
  """What is wrong with a process that came."""
  number, of = said.get("process"), said.get("processes")
  if of != processes:
    return (
      f"process {number} was told of {of} processes and process 0 of {processes}: give "
      "all the same --processes"
    )
  if number in came:
    return f"two processes came as number {number}: give each its own --process"
  return None


def _answer(guests: Sequence[socket.socket], fault: str | None) -> None:
  for guest in guests:
    with contextlib.suppress(OSError):  # it has gone: JAX or its time-out will tell
      guest.sendall(json.dumps({"fault": fault}).encode() + b"\n")


def _go(place: Place, deadline: float, timeout: float) -> None:
  """Another process: goes to process 0 and waits for its answer."""
  reason: Exception | None = None
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection(place.address, left) as way:
        line = json.dumps({"process": place.process, "processes": place.processes})
        way.sendall(line.encode() + b"\n")
        answer = _receive(way, deadline - time.monotonic() + 5)
      if answer is not None:
        if answer.get("fault"):
          raise ValueError(answer["fault"])
        return
      reason = ConnectionError("no answer")
    except OSError as error:
      reason = error
    time.sleep(0.2)
  raise ValueError(
    f"process {place.process} did not meet process 0 at {place.coordinator} within "
    f"{timeout:g} s ({reason}): start process 0 there, or correct --coordinator"
  )


def _receive(way: socket.socket, timeout: float) -> dict[str, Any] | None:
  """The JSON object of a line; None if something else came, or nothing."""
  way.settimeout(max(timeout, 0.001))
  try:
    with way.makefile("rb") as stream:
      found = json.loads(stream.readline(_LONGEST))
  except (OSError, ValueError):
    return None
  return found if isinstance(found, dict) else None
