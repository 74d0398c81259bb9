"""The persistent BF16 kernel for NVIDIA Hopper, of all grouped products.

A thread block owns one SM and walks over tiles of the output. A warp of its third
warpgroup copies operands into a ring of shared memory by TMA, running ahead into the
next tile; the other two warpgroups multiply, 64 of the tile's rows each, accumulate in
FP32 registers and store. The two thread blocks of a cluster walk side by side and fetch
once what both of their tiles need.

What bounds it on an H200 is power: under full load the clock falls to some 1.45 GHz.
So what counts is how often a byte is moved, from memory and to the SMs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.hopper import (
  persistent,
  store,
  streaming_multiprocessors,
  swizzled,
)
from kernels_pallas.ring import PerThread, PerWarp, Step, View, barriers

WARPGROUP_ROWS = 64  # of a wgmma instruction
_SWIZZLE_BYTES = 128


@dataclasses.dataclass(frozen=True)
class Tiling:
  """Sizes in elements: a tile of the output is 128 x `columns`."""

  columns: int = 256
  depth: int = 64  # of the contraction, per step of the ring
  stages: int = 4  # of the ring
  snake: int = 16  # tiles walked along rows, at most, before the next column
  rows: int = 2 * WARPGROUP_ROWS
  cluster: int = 1  # thread blocks, 1 or 2, that fetch once what both of them need


@dataclasses.dataclass(frozen=True)
class Tile:
  """What a tile of the output needs.

  Attributes:
    steps: of the contraction.
    operands: `operands(k)` gives the views of a and b for step k.
    shared: which of the two, 0 or 1, both thread blocks of a cluster need.
    out: the view of the output that it fills.
    filled: how many of its rows hold data, None for all.
  """

  steps: Any
  operands: Callable[[Any], tuple[View, View]]
  out: Any
  shared: Any = 0
  filled: Any = None


def run(
  tile: Callable[..., Tile],
  tiles: int,
  out: jax.ShapeDtypeStruct,
  t: Tiling,
  transposed: tuple[bool, bool],
  num_sms: int | None,
  interpret,
  add_to: jax.Array | None = None,
) -> Callable[..., jax.Array]:
  """A kernel of (table, a, b) that fills `out` tile by tile, or adds to `add_to`.

  `tile(i, table_ref, a_ref, b_ref, out_ref)` describes the i-th tile. An operand marked
  transposed has its contracted dimension first (a) or last (b).
  """

  piece = _store_columns(out.dtype)
  if out.shape[-1] <= piece < t.columns:  # one piece's view has no coordinate for more
    raise ValueError(
      f"an output of {out.shape[-1]} columns needs tiles of {piece}: {t}"
    )

  # Inline instructions are not interpreted.
  make_barriers, words = barriers(
    interpret is None, t.stages, 2, 2, t.cluster, _SWIZZLE_BYTES
  )

  def body(table, a_ref, b_ref, out_ref, out_smem, words, **ring):
    warpgroup = lax.axis_index("warpgroup")
    ring = _Ring(stages=t.stages, barriers=make_barriers(**words), **ring)
    ring.barriers.start()

    def describe(i):
      return tile(i, table, a_ref, b_ref, out_ref)

    @pl.when(warpgroup == 2)
    def copy():
      plgpu.set_max_registers(40, action="decrease")
      when = pl.when(ring.barriers.copies_here())
      when(lambda: _copy_operands(describe, tiles, ring))

    @pl.when(warpgroup < 2)
    def multiply():
      plgpu.set_max_registers(232, action="increase")
      fill = functools.partial(
        store, smem=out_smem.at[warpgroup], add=add_to is not None
      )
      _multiply_tiles(describe, tiles, ring, transposed, warpgroup, fill)

    ring.barriers.stop()

  scratch = _scratch(out.dtype, t, transposed) | {"words": words}

  sms = num_sms or (streaming_multiprocessors() if interpret is None else 2)
  return persistent(
    body,
    scratch,
    "grouped_matmul",
    out,
    add_to,
    clusters=sms // t.cluster,
    blocks=t.cluster,
    warpgroups=3,
    interpret=interpret,
  )


def _store_columns(dtype) -> int:
  return _SWIZZLE_BYTES // jnp.dtype(dtype).itemsize


def _scratch(dtype, t: Tiling, transposed: tuple[bool, bool]) -> dict[str, Any]:
  """Shared memory and barriers of one thread block."""
  a_block = (t.depth, t.rows) if transposed[0] else (t.rows, t.depth)
  b_block = (t.columns, t.depth) if transposed[1] else (t.depth, t.columns)
  store_columns = _store_columns(dtype)
  return {
    "a": swizzled((t.stages, *a_block), jnp.bfloat16),
    "b": swizzled((t.stages, *b_block), jnp.bfloat16),
    "out_smem": swizzled((2, 2, WARPGROUP_ROWS, store_columns), dtype),
  }


@dataclasses.dataclass(frozen=True)
class _Ring:
  """Slots of shared memory and their barriers."""

  a: Any
  b: Any
  barriers: PerThread | PerWarp
  stages: int

  def step(self, before, k) -> Step:
    """A tile's step k, `before` which so many slots were filled."""
    return Step.of_number(before + k, self.stages, k)


def _multiply_tiles(describe, tiles, ring, transposed, warpgroup, fill):
  """One warpgroup's part: 64 rows of every tile of this SM."""
  mine = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

  @plgpu.nd_loop((tiles,), collective_axes="sm", init_carry=jnp.int32(0))
  def each_tile(loop, carry):
    work = describe(loop.index[0])

    def free(k):
      ring.barriers.release(ring.step(carry, k))

    def accumulate(acc):
      def multiply(k, _):
        step = ring.step(carry, k)
        ring.barriers.wait(step)
        a, b = ring.a.at[step.slot], ring.b.at[step.slot]
        a = a.at[:, mine].transpose((1, 0)) if transposed[0] else a.at[mine]
        plgpu.wgmma(acc, a, b.transpose((1, 0)) if transposed[1] else b)
        plgpu.wgmma_wait(1)  # the step before has read its operands to the end
        pl.when(k > 0)(lambda: free(k - 1))

      lax.fori_loop(0, work.steps, multiply, None)
      plgpu.wgmma_wait(0)
      pl.when(work.steps > 0)(lambda: free(work.steps - 1))
      return acc[...]

    columns = work.out.shape[1]
    acc = plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, columns))
    product = pl.run_scoped(accumulate, acc)
    if work.filled is not None:
      row = plgpu.broadcasted_iota(
        jnp.int32, product.shape, 0, layout=plgpu.Layout.WGMMA
      )
      mine_filled = work.filled - warpgroup * WARPGROUP_ROWS
      product = jnp.where(row < mine_filled, product, 0.0)
    fill((product,), out_tile=work.out.at[mine])
    return carry + work.steps

  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _copy_operands(describe, tiles, ring):
  """Fills the ring, tile after tile, as fast as its slots come free."""

  def copy_tile(loop, carry):
    work = describe(loop.index[0])

    def fetch(k, _):
      step = ring.step(carry, k)
      to = ring.a.at[step.slot], ring.b.at[step.slot]

      def copy(shared):
        views = list(work.operands(k))
        views[shared] = dataclasses.replace(views[shared], shared=True)
        ring.barriers.copy(step, [*zip(views, to)])

      if isinstance(work.shared, int):
        copy(work.shared)
      else:
        pl.when(work.shared == 0)(lambda: copy(0))
        pl.when(work.shared == 1)(lambda: copy(1))

    lax.fori_loop(0, work.steps, fetch, None)
    return carry + work.steps

  each_tile = plgpu.nd_loop((tiles,), collective_axes="sm", init_carry=jnp.int32(0))
  ring.barriers.finish(each_tile(copy_tile))
