"""Windows: a transfer of one micro-batch beside a computation of another.

DeepSeek-V3 report, 3.2.1. XLA runs the kernels of a program one after the other. What
`jax.experimental.compute_on` puts on a CUDA stream of its own runs beside the rest if
XLA starts it before the rest and waits for it after, which takes an order that XLA's
scheduler keeps: `beside` writes it down. Not meant for `lax` collectives, which XLA
itself makes asynchronous.

CUDA graphs must be off (`WITHOUT_GRAPHS`): into a graph, XLA of jax 0.11 puts streams
one after the other (github.com/openxla/xla/pull/48900).
"""

from collections.abc import Callable, Sequence

import jax
from jax import lax
from jax.experimental.compute_on import compute_on

# For `compiler_options` of `jax.jit` on GPUs.
WITHOUT_GRAPHS = {"xla_gpu_enable_command_buffer": ""}


def beside[T, U, V](
  transfers: Sequence[tuple[Callable[[T], jax.Array], T]],
  compute: Callable[[U], V],
  operand: U,
  stream: int | None = 1,
) -> tuple[list[jax.Array], V]:
  """Transfers in a row and, at the same time, a computation that needs none of them.

  Windows follow each other: nothing that uses a result goes on before both have ended.
  Kernels that send to other devices must not meet others of their kind, so all
  transfers of a program belong on one stream, in windows that depend on each other.

  Args:
    transfers: functions of a tree of arrays, and the tree; no function uses arrays
      besides, nor `jax.jit`. Each gives one array, as XLA waits at once for a call with
      several results. They and the computation leave multiprocessors to each other.
    compute: a function of `operand`, a tree of arrays.
    stream: of the transfers; None for the computation's own, which hides nothing.

  Returns:
    What the transfers and the computation gave.
  """

  def annotated(send):
    if stream is None:
      return send
    return compute_on(
      send,
      compute_type=f"gpu_stream:{stream}",
      out_memory_spaces=jax.memory.Space.Device,
    )

  # The computation waits until all that transfers need is known, though not the other
  # way round: so the scheduler, which starts a call when the last of its operands is
  # there, starts the transfers first.
  operand, _ = lax.optimization_barrier((operand, [sent for _, sent in transfers]))
  arrived = [annotated(send)(sent) for send, sent in transfers]
  return lax.optimization_barrier((arrived, compute(operand)))
