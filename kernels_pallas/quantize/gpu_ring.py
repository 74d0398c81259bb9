"""A persistent loop over tiles on Hopper, with TMA loads running ahead.

One thread block lives on each SM: a team of four warpgroups, or two that share nothing
where shared memory holds what both need. Tiles of the sources arrive in a ring of
shared memory, filled by a team's first warpgroup as slots come free, so that loads go
on while all four compute; results leave by TMA too.

A team's first tiles are known, then it takes the next that nobody has, by a counter in
global memory (gpu_counter.py): memory does not serve all SMs as fast, and of tiles
dealt out beforehand some had none left after 92,000 of 129,000 cycles.

Two teams are not two blocks because a block bounds the registers of its threads, to 64
for two teams and 128 for one; of a smaller block the compiler uses more registers than
allow a second one beside it.
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
from kernels_pallas.quantize import gpu_counter

WARPGROUPS = 4  # of a team
_TEAMS = 2  # on an SM, where shared memory suffices
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
  scratch: Callable[[int], Sequence[Any]],
  scratch_bytes: int,
  num_sms: int | None = None,
  interpret=None,
) -> Sequence[jax.Array]:
  """Calls compute(tile, t, slots, scalars, outputs, scratch) for every tile of a grid.

  `tile` is its index in the grid, t counts the tiles of this team, `slots` are the
  sources' tiles in shared memory, the others are references. It calls `commit_smem`
  after its last load from a slot: TMA may write there next. `scratch(teams)` are the
  types of what else lies in shared memory, with a first dimension for teams, in
  `scratch_bytes` for each. `num_sms`: multiprocessors to use, None for all.

  Tiles are taken in the grid's order: 16 rows of tiles at a time, column by column, so
  that a transpose is written in longer pieces, was up to 17% slower on an H200.
  """
  tiles = math.prod(grid)
  bytes_each = sum(source.tile_bytes for source in sources)
  fits = _TEAMS * (scratch_bytes + 2 * bytes_each) <= _SHARED_BYTES
  teams = _TEAMS if fits else 1
  stages = min(6, (_SHARED_BYTES // teams - scratch_bytes) // bytes_each)
  sms = num_sms or (hopper.streaming_multiprocessors() if interpret is None else 2)
  blocks, ahead = min(pl.cdiv(tiles, teams), sms), stages - 1

  def body(*refs):
    refs = list(refs)
    arrays = [refs.pop(0) for _ in sources]
    scalar_refs = [refs.pop(0) for _ in scalars]
    counter_ref = refs.pop(0)
    out_refs = [refs.pop(0) for _ in out]
    rings = [refs.pop(0) for _ in sources]
    filled, free, indices = refs.pop(-3), refs.pop(-2), refs.pop(-1)
    team = lax.div(lax.axis_index("warpgroup"), WARPGROUPS)
    number = team * blocks + lax.axis_index("block")  # of this team among all
    first = warpgroup() == 0

    def slot_of(t):
      return team * stages + lax.rem(t, stages)

    def fetch(t, index):
      """Tile `index` into the t-th slot; past the last tile only says so."""
      slot = slot_of(t)
      indices[slot] = index  # before the arrivals at the slot's barrier

      @pl.when(index < tiles)
      def copy():
        for source, array, ring in zip(sources, arrays, rings):
          plgpu.copy_gmem_to_smem(
            array.at[source.at(*_place(index, grid))], ring.at[slot], filled.at[slot]
          )

      @pl.when(index >= tiles)
      def end():
        for _ in sources:
          plgpu.barrier_arrive(filled.at[slot])

    def received(t):
      """The index of the tile in the t-th slot, once it is there."""
      plgpu.barrier_wait(filled.at[slot_of(t)])
      return indices[slot_of(t)]

    @pl.when(first)
    def fill():
      for t in range(ahead):
        fetch(jnp.int32(t), number + t * teams * blocks)

    def ask(t):
      """For what the t-th fetch gets, known a tile later: how many asked before."""
      if interpret is None:
        return gpu_counter.ask(counter_ref, first)
      return number + (t - ahead) * teams * blocks  # inline code is not interpreted

    def one_tile(carry):
      t, index, asked = carry

      @pl.when(first)
      def refill():
        @pl.when(t > 0)
        def wait():  # all have read the tile before
          plgpu.barrier_wait(free.at[slot_of(t - 1)])

        answer = asked
        if interpret is None:
          answer = gpu_counter.answer(
            asked, indices.at[pl.ds(teams * stages + team, 1)]
          )
        fetch(t + ahead, ahead * teams * blocks + answer)

      asked = ask(t + 1 + ahead)
      slot = slot_of(t)
      slots = [ring.at[slot] for ring in rings]
      ours = [ref.at[team] for ref in refs]
      compute(_place(index, grid), t, slots, scalar_refs, out_refs, ours)
      # All threads arrive, each after its loads and the fence of its last commit_smem,
      # without which TMA's writes would not be ordered after those loads.
      plgpu.barrier_arrive(free.at[slot])
      return t + 1, received(t + 1), asked

    asked = ask(jnp.int32(ahead))
    start = jnp.int32(0), received(jnp.int32(0)), asked
    done, *_ = lax.while_loop(lambda carry: carry[1] < tiles, one_tile, start)

    @pl.when(first & (done > 0))
    def drain():
      plgpu.barrier_wait(free.at[slot_of(done - 1)])

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  run = plgpu.kernel(
    body,
    out_type=list(out),
    scratch_types=[
      *[_ring(source, teams * stages) for source in sources],
      *scratch(teams),
      plgpu.Barrier(num_arrivals=len(sources), num_barriers=teams * stages),
      plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=teams * stages),
      plgpu.SMEM((teams * stages + teams,), jnp.int32),
    ],
    grid=(blocks,),
    grid_names=("block",),
    num_threads=teams * WARPGROUPS,
    thread_name="warpgroup",
    compiler_params=PARAMS,
    interpret=interpret,
  )
  arrays = [source.array for source in sources]
  return _with_counter(run, out)(*arrays, *scalars)


def _with_counter(run: Callable, out: Sequence[jax.ShapeDtypeStruct]) -> Callable:
  """`run`, whose last operand is a reference to a counter from 0 on, of the others.

  What is written in place cannot be batched, so `jax.vmap` calls it one by one.
  """

  @jax.custom_batching.sequential_vmap
  def call(*operands):
    def fill(refs):
      counter_ref, *out_refs = refs
      for ref, value in zip(out_refs, run(*operands, counter_ref)):
        ref[...] = value

    empty = [lax.empty(x.shape, x.dtype) for x in out]
    return hopper.in_place(fill, [jnp.zeros((1,), jnp.int32), *empty])[1:]

  return call


def warpgroup() -> jax.Array:
  """The number of this warpgroup in its team."""
  return lax.rem(lax.axis_index("warpgroup"), WARPGROUPS)


def _place(index, grid: tuple[int, ...]) -> tuple:
  """A tile's place in the grid."""
  place = []
  for size in reversed(grid):
    place.append(lax.rem(index, size))
    index = lax.div(index, size)
  return tuple(reversed(place))


def _ring(source: Source, slots: int):
  shape = (slots, *source.shape)
  if len(source.shape) == 1:
    return plgpu.SMEM(shape, source.array.dtype)
  return swizzled(shape, source.array.dtype)


def swizzled(shape: tuple[int, ...], dtype):
  """Shared memory whose rows TMA spreads over the banks, in units of SWIZZLE bytes."""
  return hopper.swizzled(shape, dtype, bytes_=SWIZZLE)
