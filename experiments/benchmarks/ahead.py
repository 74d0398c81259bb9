"""Seconds of short kernels by themselves, without the host's launches.

Launching a kernel takes the host 10 to 40 us, by its operands, which is more than some
of them take. What is queued while the device is busy with something else is launched
before its first kernel starts, and then takes what the device takes. The device's own
clock says when that was: the host would wake up too late.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.hopper import int32

MOST = 24  # programs: JAX lets some 30 wait for the device, then waits itself
_CYCLES = 60_000_000  # of a GPU at 2 GHz, 30 ms
_TRIES = 5
_LATE = "the host takes too long to launch: queue fewer programs"
_CYCLES_OF_A_TURN = 8  # of a multiplication and an addition, one after the other


def seconds_behind_work(queue: Callable[[], Any]) -> float:
  """Seconds on the device of what `queue()` launches, `MOST` programs at most.

  They should have run before: the first time takes longer to launch. If the device is
  done with its other work before all are launched, the reading is dropped.

  Raises:
    RuntimeError: that happened again and again.
  """
  work, clock = _work_then_clock(_CYCLES), _work_then_clock(0)
  for _ in range(_TRIES):
    start = work()
    queue()
    in_time = not start.is_ready()  # pyright: ignore[reportAttributeAccessIssue]
    times = start, clock()
    nanoseconds = [int(np.asarray(time).view(np.int64)[0]) for time in times]
    if in_time:
      return (nanoseconds[1] - nanoseconds[0]) / 1e9
  raise RuntimeError(_LATE)


@functools.cache
def _work_then_clock(cycles: int) -> Callable[[], jax.Array]:
  """What keeps one multiprocessor busy for so long, then reads its nanoseconds."""

  def kernel(x_ref, waste_ref, time_ref):
    def turn(_, x):
      return x * 0.999 + 0.001

    waste_ref[0] = lax.fori_loop(0, cycles // _CYCLES_OF_A_TURN, turn, x_ref[0])
    low, high = _nanoseconds()
    time_ref[0] = low
    time_ref[1] = high

  out = [
    jax.ShapeDtypeStruct((1,), jnp.float32),
    jax.ShapeDtypeStruct((2,), jnp.int32),
  ]
  run = jax.jit(plgpu.kernel(kernel, out_type=out, grid=(1,), grid_names=("sm",)))
  x = jnp.ones((1,))
  jax.block_until_ready(run(x))
  return lambda: run(x)[1]


def _nanoseconds():
  """Both words of the GPU's clock."""
  word = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), plgpu.Layout.WG_SPLAT)

  def inline(_):
    ptx = "{.reg .b64 t; mov.b64 t, %globaltimer; mov.b64 {$0, $1}, t;}"
    words = mgpu_utils.inline_ptx(
      ptx, result_types=[int32()] * 2, has_side_effects=True
    )
    return [mgpu.FragmentedArray.splat(word, (), is_signed=True) for word in words]

  run: Any = plgpu.inline_mgpu(return_type=[word, word])(inline)
  return run()


def torch_seconds_behind_work(queue: Callable[[], Any]) -> float:
  """The same for PyTorch's current stream."""
  import torch  # pyright: ignore[reportMissingImports]

  for _ in range(_TRIES):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_CYCLES)
    start.record()
    queue()
    end.record()
    in_time = not start.query()
    torch.cuda.synchronize()
    if in_time:
      return start.elapsed_time(end) / 1e3
  raise RuntimeError(_LATE)
