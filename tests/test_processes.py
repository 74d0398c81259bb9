"""What can be known about several processes in one; see experiments/ for real ones."""

import socket

import pytest

from deepseek_jax import processes
from deepseek_jax.processes import Place, is_loss


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
  assert Place("[::1]:8476", 1, 0).coordinator == "[::1]:8476"


def test_waiting_for_a_port():
  with socket.socket() as listener:
    listener.bind(("localhost", 0))
    address = f"localhost:{listener.getsockname()[1]}"
    with pytest.raises(TimeoutError):
      processes._wait_for_port(address, 1)
    listener.listen()
    processes._wait_for_port(address, 1)


def test_a_lost_process_is_told_from_other_errors():
  gone = RuntimeError("UNKNOWN: Gloo AllReduce failed: Connection closed by peer")
  assert is_loss(gone)
  wrapped = ValueError("cannot save")
  wrapped.__cause__ = gone
  assert is_loss(wrapped)
  assert not is_loss(None)
  assert not is_loss(RuntimeError("RESOURCE_EXHAUSTED: out of memory"))
  assert not is_loss(ValueError("barrier=3 must divide 4"))


def test_the_first_process_alone_needs_no_one_to_wait_for():
  with processes.first_alone("a test"):
    pass
