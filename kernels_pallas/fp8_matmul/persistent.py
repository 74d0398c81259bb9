"""The persistent FP8 kernel for NVIDIA Hopper, of the dense and grouped products.

A thread block walks over tiles of the output. A warp of its last warpgroup copies
operands and their scales into a ring of shared memory by TMA, running ahead into the
next tile; the other warpgroups, up to three, multiply 64 of the tile's rows each.
Promotion is DeepSeek's (DeepSeek-V3 report, section 3.3.2; DeepGEMM): 128 of the
contraction go through the tensor cores into a fresh accumulator, which is then scaled
and added to sums in FP32 registers. While one warpgroup promotes, the other's products
keep the tensor cores busy.

What bounds it on an H200 (Nsight Compute): with three warpgroups the tensor cores are
busy 90 to 95% of the cycles and shared memory as much, and the clock falls to what 700
W allow, so that each instruction left out counts. Hence barriers of our own
(../ring.py), loops that turn once a round, and pairs of thread blocks that fetch their
rows once.

Of few rows moving the weights is what takes time; there a copy brings more than 128 of
the contraction, products start as copies arrive, and several thread blocks may take a
part of one tile's contraction each (split.py).

Left out: Blackwell.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.fp8_matmul.promotion import BLOCK, WARPGROUP_ROWS, Part, Ring
from kernels_pallas.fp8_matmul.split import Split
from kernels_pallas.hopper import (
  persistent,
  store,
  streaming_multiprocessors,
  swizzled,
)
from kernels_pallas.ring import View, barriers

_SCALES_AT_ONCE = 32  # of columns, so that they fit in registers beside the sums


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How one product is cut; a tile of the output is `rows` x `columns`.

  Attributes:
    columns: a multiple of 8 up to 256 that divides 128, or a multiple of 64.
    stages: steps of 128 that the ring holds.
    snake: tiles walked along rows before the next column: reuse in L2.
    fresh: columns of one fresh accumulator; 0 for all of the tile's.
    warpgroups: that multiply, 1 to 3, 64 rows of a tile each. With three, two have
      products in the tensor cores' queue while one promotes, but fewer registers.
    together: steps that are multiplied at once, up to `stages`: in tiles so small that
      a step is mostly latency.
    fetched: steps that one copy brings, into one slot of the ring; fewer where they do
      not divide a tile's steps, a thread block's part or its own (tilings.of_steps).
    cluster: thread blocks, 1 or 2, that fetch the rows of a once for all of them; their
      tiles lie side by side.
    split: thread blocks, 1 to 8, that take a part of a tile's contraction each, with
      one or two warpgroups.
    own_last: steps at the end of a split tile that each thread block multiplies for its
      own columns instead, while sums travel; none where a tile has too few.
  """

  columns: int = 128
  stages: int = 5
  snake: int = 16
  fresh: int = 0
  warpgroups: int = 2
  together: int = 1
  fetched: int = 1
  cluster: int = 1
  split: int = 1
  own_last: int = 0

  @property
  def rows(self) -> int:
    return WARPGROUP_ROWS * self.warpgroups

  @property
  def slots(self) -> int:
    return self.stages // self.fetched

  @property
  def registers(self) -> tuple[int, int]:
    """Of a thread that copies and of one that multiplies: all that there are.

    With one more in sum the increase never returns.
    """
    return (32, 160) if self.warpgroups == 3 else (40, 232)


@dataclasses.dataclass(frozen=True)
class Tile:
  """What a tile of the output needs, as views of global memory for step k.

  Where F steps are fetched at once, those of operands and row scales are of F steps.
  """

  steps: Any
  operands: Callable[[Any], tuple[View, View]]  # a [rows, 128 F], b [columns, 128 F]
  row_scales: Callable[[Any], View]  # [rows], or [F, rows]
  column_scales: Callable[[Any], Any]  # a View [columns], or scalars a granule each
  out: Any  # [rows, columns]
  rows: Any = None  # of the tile that hold data, None for all
  busy: Any = None  # the first warpgroups that have rows of it, None for all
  last: Any = None  # a tile of the steps that follow, for a part of the columns


def granule(columns: int) -> int:
  """Columns of a tile that surely share a scale block of 128."""
  return math.gcd(columns, BLOCK)


def run(
  tile: Callable[..., Tile],
  tiles: int,
  out: jax.ShapeDtypeStruct,
  t: Tiling,
  *,
  scale_each_column: bool,
  add_to: jax.Array | None = None,
  num_sms: int | None = None,
  swizzle: int = 128,
  sum_bits: int | None = None,
  steps: int | None = None,
  interpret=None,
) -> Callable[..., jax.Array]:
  """A function of the operands that fills `out` tile by tile.

  Args:
    tile: `tile(i, *operand_refs, out_ref)` describes the i-th tile.
    tiles: number of tiles.
    scale_each_column: b has a scale a column, not one a granule of columns.
    add_to: an array that the product is added to in place, instead of a new one.
    num_sms: multiprocessors to use, None for all.
    swizzle: bytes; must divide the contracted dimension.
    sum_bits: significant bits that sums keep from one promotion to the next, None for
      all of FP32's. 14 emulates what the tensor cores do without promotion.
    steps: of every tile that is not empty, None where they differ.
  """

  if t.together > t.stages:
    raise ValueError(f"{t.together} steps at once do not fit in {t.stages} stages: {t}")
  if t.together > 1 and scale_each_column:
    raise ValueError(f"steps at once need one scale for many columns: {t}")
  if t.cluster > 1 and (t.together > 1 or t.fresh):
    raise ValueError(f"clusters need steps one by one and whole sums: {t}")
  plain = not scale_each_column and sum_bits is None
  if t.split > 1 and not (plain and t.cluster == 1 and t.warpgroups <= 2):
    raise ValueError(f"only plain products of few rows are split: {t}")
  if t.fetched > 1 and (t.together % t.fetched or t.stages % t.fetched or not plain):
    what = "its stages and the steps multiplied at once, of a plain product"
    raise ValueError(f"{t.fetched} steps fetched at once must divide {what}: {t}")
  if t.split > 1 and t.columns % (16 * t.split):
    raise ValueError(f"a block's part of the columns must be a multiple of 16: {t}")
  if t.own_last and t.columns > granule(t.columns):  # they have a scale a granule
    raise ValueError(f"a tile with steps of its blocks' own needs one scale: {t}")
  piece = _store_columns(t, out.dtype)
  if out.shape[-1] <= piece < t.columns:  # one piece's view has no coordinate for more
    raise ValueError(
      f"an output of {out.shape[-1]} columns needs tiles of {piece}: {t}"
    )

  # Inline instructions are not interpreted; sums in parts have tiles so large that no
  # shared memory is left.
  per_warp = interpret is None and not t.fresh
  copies = 4 if scale_each_column else 3
  make_barriers, words = barriers(
    per_warp, t.slots, t.warpgroups, copies, t.cluster, swizzle
  )

  # Where each column has a scale, or sums are cut, that takes more registers than there
  # are. Of a single round the compiler makes no loop, and then waits for each product.
  # Blocks that split a tile have fewer steps than it.
  in_rounds = per_warp and plain and t.split == t.together == 1 and t.stages <= 4
  if in_rounds:
    in_rounds = steps is not None and steps > t.stages and steps % t.stages == 0

  def body(*refs, out_smem, words, received=None, arrived=None, **slots):
    *refs, out_ref = refs
    split = None
    if t.split > 1:
      split = Split(t.split, t.columns, t.warpgroups, received, arrived, t.own_last)
      split.start()
    ring = Ring(
      t=t,
      sum_bits=sum_bits,
      barriers=make_barriers(**words),
      whole_rounds=in_rounds,
      **slots,
    )
    ring.barriers.start()
    warpgroup = lax.axis_index("warpgroup")

    def describe(i):
      work = tile(i, *refs, out_ref)
      return split.share(work) if split else work

    @pl.when(warpgroup == t.warpgroups)
    def copy():
      plgpu.set_max_registers(t.registers[0], action="decrease")
      when = pl.when(ring.barriers.copies_here())
      when(lambda: _copy_operands(describe, tiles, ring, scale_each_column))
      if split:
        split.meet()

    @pl.when(warpgroup < t.warpgroups)
    def multiply():
      plgpu.set_max_registers(t.registers[1], action="increase")
      fill = functools.partial(
        store, smem=out_smem.at[warpgroup], add=add_to is not None
      )
      _multiply_tiles(describe, tiles, ring, fill, warpgroup, split)

    ring.barriers.stop()

  sms = num_sms or (streaming_multiprocessors() if interpret is None else 2)
  return persistent(
    body,
    _scratch(out.dtype, t, scale_each_column, swizzle) | {"words": words},
    "fp8_matmul",
    out,
    add_to,
    # A cluster has one tile if it splits it.
    clusters=tiles if t.split > 1 else sms // t.cluster,
    blocks=t.cluster * t.split,
    warpgroups=t.warpgroups + 1,
    interpret=interpret,
  )


def _scratch(
  out_dtype, t: Tiling, scale_each_column: bool, swizzle: int
) -> dict[str, Any]:
  """Shared memory of one thread block."""
  columns = _store_columns(t, out_dtype)
  bytes_ = columns * jnp.dtype(out_dtype).itemsize
  depth, several = t.fetched * BLOCK, (t.fetched,) if t.fetched > 1 else ()
  scratch = {
    "a": swizzled((t.slots, t.rows, depth), jnp.float8_e4m3fn, swizzle),
    "b": swizzled((t.slots, t.columns, depth), jnp.float8_e4m3fn, swizzle),
    "sa": plgpu.SMEM((t.slots, *several, t.rows), jnp.float32),
    "out_smem": swizzled((t.warpgroups, 2, WARPGROUP_ROWS, columns), out_dtype, bytes_),
  }
  if scale_each_column:
    scratch["sb"] = plgpu.SMEM((t.slots, t.columns), jnp.float32)
  if t.split > 1:
    scratch |= Split.scratch(t.split, t.columns, t.warpgroups)
  return scratch


def _multiply_tiles(describe, tiles, ring, fill, warpgroup, split):
  """One warpgroup's part: 64 rows of every tile of this thread block."""
  width = granule(ring.t.columns)
  if ring.sb is not None:
    width = min(width, _SCALES_AT_ONCE)
  mine = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

  @plgpu.nd_loop((tiles,), collective_axes="sm", init_carry=jnp.int32(0))
  def each_tile(loop, carry):
    work = describe(loop.index[0])
    zero = jnp.zeros((WARPGROUP_ROWS, width), jnp.float32)
    zero = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
    zeros = (zero,) * (ring.t.columns // width)
    part = Part(ring, work, mine, carry)
    steps = work.steps
    if work.busy is not None:
      steps = jnp.where(warpgroup < work.busy, steps, 0)
    sums = part.add_all(steps, zeros)
    if work.busy is not None:
      part.skip_all(steps, work.steps)
    if work.rows is not None:
      sums = _mask(sums, work.rows - warpgroup * WARPGROUP_ROWS)
    fillings = ring.fillings(work.steps)
    if split:
      split.meet()
      sums = (split.send(sums, warpgroup),)
      if work.last is not None:
        own = Part(ring, work.last, mine, carry + fillings)
        sums = own.add_all(work.last.steps, sums)
      sums = (split.receive(*sums, warpgroup),)
      fill(sums, out_tile=split.own(work.out.at[mine]))
    elif work.busy is None:
      fill(sums, out_tile=work.out.at[mine])
    else:
      when = pl.when(warpgroup < work.busy)
      when(lambda: fill(sums, out_tile=work.out.at[mine]))
    return carry + fillings

  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _mask(sums, rows):
  """Zeros in the rows from `rows` on."""
  shape = sums[0].shape
  row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
  return tuple(jnp.where(row < rows, part, 0.0) for part in sums)


def _copy_operands(describe, tiles, ring, scale_each_column):
  """Fills the ring, tile after tile, as fast as its slots come free."""
  t = ring.t

  def copy_tile(loop, carry):
    work = describe(loop.index[0])

    def copy(step, rows, work=work):
      a, b = work.operands(step.k)
      copies = [
        (a.rows(rows), ring.a.at[step.slot, pl.ds(0, rows)]),
        (b, ring.b.at[step.slot, pl.ds(0, b.count)]),
        (work.row_scales(step.k), ring.sa.at[step.slot]),
      ]
      if scale_each_column:
        copies.append((work.column_scales(step.k), ring.sb.at[step.slot]))
      ring.barriers.copy(step, copies)

    def copy_needed(steps, _):
      for step in steps:
        if work.busy is None:
          copy(step, t.rows)
        else:
          for warpgroups in range(1, t.warpgroups + 1):
            when = pl.when(work.busy == warpgroups)
            when(functools.partial(copy, step, warpgroups * WARPGROUP_ROWS))

    fillings = ring.fillings(work.steps)
    ring.each_round(carry, 0, fillings, copy_needed, None, unroll=False)
    if work.last is not None:

      def copy_last(steps, _):
        for step in steps:
          copy(step, t.rows, work.last)

      more = ring.fillings(work.last.steps)
      ring.each_round(carry + fillings, 0, more, copy_last, None, unroll=False)
    return carry + fillings

  each_tile = plgpu.nd_loop((tiles,), collective_axes="sm", init_carry=jnp.int32(0))
  ring.barriers.finish(each_tile(copy_tile))


def _store_columns(t: Tiling, dtype) -> int:
  return min(128 // jnp.dtype(dtype).itemsize, granule(t.columns // t.split))
