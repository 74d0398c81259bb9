"""What can be known about several processes in one; see experiments/ for real ones."""

from deepseek_jax import processes
from deepseek_jax.processes import is_loss


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
