"""Windows: a transfer of one micro-batch beside a computation of another.

DeepSeek-V3 report, 3.2.1. XLA runs the kernels of a program one after the other. What
`jax.experimental.compute_on` puts on a CUDA stream of its own runs beside the rest if
XLA starts it before the rest and waits for it after, which takes an order that XLA's
scheduler keeps: `beside` writes it down. Not meant for `lax` collectives, which XLA
itself makes asynchronous.

CUDA graphs must be off (`WITHOUT_GRAPHS`): into a graph, XLA of jax 0.11 puts streams
one after the other (github.com/openxla/xla/pull/48900).
"""

from collections.abc import Callable

import jax
from jax import lax
from jax.experimental.compute_on import compute_on

# For `compiler_options` of `jax.jit` on GPUs.
WITHOUT_GRAPHS = {"xla_gpu_enable_command_buffer": ""}


def beside[S, T, U, V](
  transfer: Callable[[S], T],
  sent: S,
  compute: Callable[[U], V],
  operand: U,
  stream: int | None = 1,
) -> tuple[T, V]:
  """`transfer(sent)` and `compute(operand)`, neither of which needs the other's result.

  Windows follow each other: nothing that uses a result goes on before both have ended.
  Kernels that send to other devices must not meet others of their kind, so all
  transfers of a program belong on one stream, in windows that depend on each other.

  Args:
    transfer: leaves multiprocessors to `compute`, and `compute` to it; may not contain
      functions under `jax.jit`.
    sent, operand: trees of arrays.
    stream: of the transfer; None for the computation's own, which hides nothing.

  Returns:
    Both results.
  """
  if stream is not None:
    device = jax.memory.Space.Device
    transfer = compute_on(
      transfer, compute_type=f"gpu_stream:{stream}", out_memory_spaces=device
    )
  # The computation waits until the transfer's operands are known, though not the other
  # way round: so the scheduler starts the transfer first.
  operand, _ = lax.optimization_barrier((operand, sent))
  return lax.optimization_barrier((transfer(sent), compute(operand)))
