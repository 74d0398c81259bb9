"""Processes that meet, as threads: none of it needs JAX."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from deepseek_jax.meeting import Place, meet


@pytest.fixture
def address():
  with socket.socket() as listener:
    listener.bind(("localhost", 0))
    return f"localhost:{listener.getsockname()[1]}"


def _meet(address, *members: tuple[int, int], timeout: float = 20) -> list[str]:
  """What each (process, of processes) is told; empty if they met."""

  def one(member: tuple[int, int]) -> str:
    process, processes = member
    try:
      meet(Place(address, processes, process), timeout)
    except ValueError as error:
      return str(error)
    return ""

  with ThreadPoolExecutor(len(members)) as pool:
    told = list(pool.map(one, members))
  assert not any("\n" in line for line in told)
  return told


@pytest.mark.parametrize("processes", [1, 2, 9])
def test_all_meet_and_leave_the_port(address, processes):
  for _ in range(2):
    assert not any(_meet(address, *((i, processes) for i in range(processes))))


def test_the_others_may_come_first(address):
  with ThreadPoolExecutor(2) as pool:
    early = pool.submit(_meet, address, (1, 2))
    time.sleep(0.5)
    assert _meet(address, (0, 2)) == early.result() == [""]


def test_who_does_not_come_is_named(address):
  told = _meet(address, (0, 12), (2, 12), timeout=1)
  assert told[0] == told[1]
  assert told[0].startswith(
    "of 12 processes 1, 3, 4, 5, 6, 7, 8, 9, 10 and 1 more did not come to port"
  )


def test_other_numbers_of_processes(address):
  told = _meet(address, (0, 2), (1, 3))
  assert told[0] == told[1]
  assert told[0].startswith("process 1 was told of 3 processes and process 0 of 2")


def test_the_same_number_twice(address):
  told = _meet(address, (0, 3), (1, 3), (1, 3))
  assert len(set(told)) == 1
  assert told[0].startswith("two processes came as number 1")


def test_nobody_listens(address):
  (told,) = _meet(address, (1, 2), timeout=0.5)
  assert told.startswith(f"process 1 did not meet process 0 at {address} within 0.5 s")
  assert "refused" in told


def test_no_such_host():
  (told,) = _meet("host.invalid:8476", (1, 2), timeout=0.5)
  assert told.startswith("process 1 did not meet process 0 at host.invalid:8476")


def test_a_port_in_use(address):
  with socket.create_server(Place(address, 1, 0).address):
    (told,) = _meet(address, (0, 2), timeout=1)
  assert told.startswith("process 0 cannot listen at port")


def test_other_programs_at_the_port_are_ignored(address):
  def knock():
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
      try:
        with socket.create_connection(Place(address, 1, 0).address, 1) as way:
          way.sendall(b"GET / HTTP/1.1\r\n\r\n")
          return
      except OSError:
        time.sleep(0.05)

  thread = threading.Thread(target=knock)
  thread.start()
  with ThreadPoolExecutor(1) as pool:
    first = pool.submit(_meet, address, (0, 2))
    thread.join()
    assert _meet(address, (1, 2)) == first.result() == [""]


@pytest.mark.parametrize(
  ("place", "says"),
  [
    (("host", 2, 0), r"coordinator='host' must be HOST:PORT"),
    (("host:port", 2, 0), r"coordinator='host:port' must be HOST:PORT"),
    (("host:70000", 2, 0), r"coordinator='host:70000' must be HOST:PORT"),
    (("host:8476", 0, 0), r"processes=0 must be at least 1"),
    (("host:8476", 2, 2), r"process=2 must be one of 0 to 1, as processes=2"),
    (("host:8476", 2, -1), r"process=-1 must be one of 0 to 1"),
  ],
)
def test_impossible_places(place, says):
  with pytest.raises(ValueError, match=says):
    Place(*place)


def test_addresses_of_version_6():
  assert Place("[::1]:8476", 1, 0).address == ("::1", 8476)
