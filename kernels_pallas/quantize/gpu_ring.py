"""A persistent loop over tiles on Hopper, with TMA loads running ahead.

One thread block of four warpgroups lives on each SM, or two where shared memory holds
both; together they take turns at the tiles. Tiles of the sources arrive in a ring of
shared memory, filled by the first warpgroup as slots come free, so that loads go on
while all four compute; results leave by TMA too. Four warpgroups also bound the
registers of a thread to 128, which the compiler would otherwise exceed.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper

WARPGROUPS = 4
_BLOCKS = 2  # thread blocks on an SM, where shared memory suffices
# No barriers of the compiler's own: TMA writes shared memory that threads read, threads
# write what TMA reads after commit_smem, and what threads exchange passes a barrier.
PARAMS = plgpu.CompilerParams(
  approx_math=True, reduction_scratch_bytes=0, unsafe_no_auto_barriers=True
)
SWIZZLE = 64  # bytes of a row that TMA spreads over the banks together
_SHARED_BYTES = 225 * 1024  # of an SM's 227, for rings and what a kernel asks for


@dataclasses.dataclass(frozen=True)
class Source:
  """An array read tile by tile: `at(tile)` are a tile's indices in it."""

  array: jax.Array
  shape: tuple[int, ...]  # of a tile
  at: Callable[..., tuple]

  @property
  def tile_bytes(self) -> int:
    return math.prod(self.shape) * self.array.dtype.itemsize


def for_each_tile(
  compute: Callable,
  grid: tuple[int, ...],
  sources: Sequence[Source],
  scalars: Sequence[jax.Array],
  out: Sequence[jax.ShapeDtypeStruct],
  scratch: Sequence[Any],
  scratch_bytes: int,
  interpret=None,
) -> Sequence[jax.Array]:
  """Calls compute(tile, t, slots, scalars, outputs, scratch) for every tile of a grid.

  `tile` is its index in the grid, t counts the tiles of this SM, `slots` are the
  sources' tiles in shared memory, the others are references.
  """
  tiles = math.prod(grid)
  bytes_each = sum(source.tile_bytes for source in sources)
  fits = _BLOCKS * (scratch_bytes + 2 * bytes_each) <= _SHARED_BYTES
  blocks = _BLOCKS if fits else 1
  stages = min(6, (_SHARED_BYTES // blocks - scratch_bytes) // bytes_each)
  sms = hopper.streaming_multiprocessors() if interpret is None else 2
  workers = min(tiles, blocks * sms)

  def body(*refs):
    refs = list(refs)
    arrays = [refs.pop(0) for _ in sources]
    scalar_refs = [refs.pop(0) for _ in scalars]
    out_refs = [refs.pop(0) for _ in out]
    rings = [refs.pop(0) for _ in sources]
    filled, free = refs.pop(-2), refs.pop(-1)
    mine = lax.div(tiles - lax.axis_index("worker") + workers - 1, workers)
    first = lax.axis_index("warpgroup") == 0

    def tile_of(t):
      index = lax.axis_index("worker") + t * workers
      place = []
      for size in reversed(grid):
        place.append(lax.rem(index, size))
        index = lax.div(index, size)
      return tuple(reversed(place))

    def fetch(t):
      @pl.when(t < mine)
      def copy():
        slot = lax.rem(t, stages)
        for source, array, ring in zip(sources, arrays, rings):
          plgpu.copy_gmem_to_smem(
            array.at[source.at(*tile_of(t))], ring.at[slot], filled.at[slot]
          )

    @pl.when(first)
    def fill():
      for t in range(stages - 1):
        fetch(jnp.int32(t))

    def one_tile(t, _):
      @pl.when(first)
      def refill():
        @pl.when(t > 0)
        def wait():  # all have read the tile before
          plgpu.barrier_wait(free.at[lax.rem(t - 1, stages)])

        fetch(t + stages - 1)

      slot = lax.rem(t, stages)
      plgpu.barrier_wait(filled.at[slot])
      compute(tile_of(t), t, [r.at[slot] for r in rings], scalar_refs, out_refs, refs)
      plgpu.barrier_arrive(free.at[slot])

    lax.fori_loop(0, mine, one_tile, None)

    @pl.when(first)
    def drain():
      plgpu.barrier_wait(free.at[lax.rem(mine - 1, stages)])

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  return plgpu.kernel(
    body,
    out_type=list(out),
    scratch_types=[
      *[_ring(source, stages) for source in sources],
      *scratch,
      plgpu.Barrier(num_arrivals=len(sources), num_barriers=stages),
      plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    ],
    grid=(workers,),
    grid_names=("worker",),
    num_threads=WARPGROUPS,
    thread_name="warpgroup",
    compiler_params=PARAMS,
    interpret=interpret,
  )(*[source.array for source in sources], *scalars)


def _ring(source: Source, stages: int):
  shape = (stages, *source.shape)
  if len(source.shape) == 1:
    return plgpu.SMEM(shape, source.array.dtype)
  return swizzled(shape, source.array.dtype)


def swizzled(shape: tuple[int, ...], dtype):
  """Shared memory whose rows TMA spreads over the banks, in units of SWIZZLE bytes."""
  return hopper.swizzled(shape, dtype, bytes_=SWIZZLE)
