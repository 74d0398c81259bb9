"""Grouped matrix product on NVIDIA Hopper: persistent Mosaic GPU kernels, BF16.

Since every group is a multiple of 128 rows, a block of 128 rows has one expert, found
in a small array; no group is split and none is searched for. (JAX ships kernels for
arbitrary groups, `jax.experimental.pallas.ops.gpu.ragged_dot_mgpu`; they unroll over
the groups. The benchmark times both.)

One kernel serves the three products. A thread block owns one SM and walks over tiles of
the output. Its third warpgroup copies operands into a ring of shared memory by TMA,
running ahead into the next tile; the other two multiply, 64 of the tile's rows each,
accumulate in FP32 registers and store.

Shapes: Z rows, E experts (groups), D input, F output.
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

from kernels_pallas.grouped_matmul import schedule
from kernels_pallas.hopper import (
  in_place,
  streaming_multiprocessors,
  swizzled,
  traced_once,
)

ROW_MULTIPLE = schedule.BLOCK_ROWS
_WARPGROUP_ROWS = 64  # of a wgmma instruction
_SWIZZLE_BYTES = 128


@dataclasses.dataclass(frozen=True)
class Tiling:
  """Sizes in elements: a tile of the output is 128 x `columns`."""

  columns: int = 256
  depth: int = 64  # of the contraction, per step of the ring
  stages: int = 4  # of the ring
  snake: int = 16  # tiles walked along rows before the next column: reuse in L2
  rows: int = 2 * _WARPGROUP_ROWS


def _tiling(columns: int) -> Tiling:
  """A wider tile than the output of 64 columns would overwrite them: see `_store`."""
  return Tiling(columns=64) if columns == 64 else Tiling()


def unsupported(dtype: jax.typing.DTypeLike, d: int, f: int) -> str | None:
  """Why these kernels cannot multiply so, or None when they can."""
  if dtype != jnp.bfloat16:
    return f"multiplies bfloat16 only, got {jnp.dtype(dtype).name}: cast to bfloat16"
  if d % 64 or f % 64:
    return f"needs D and F that are multiples of 64, got D={d}, F={f}"
  return None


@traced_once("transpose_w", "num_sms", "tiling", "interpret")
def multiply(
  x_ZD: jax.Array,
  w_EDF: jax.Array,
  sizes_E: jax.Array,
  transpose_w: bool = False,
  num_sms: int | None = None,
  tiling: Tiling | None = None,
  interpret=None,
) -> jax.Array:
  """Row z of group e becomes x_z @ w_e (or @ w_e^T); rows of no group become 0."""
  blocks = schedule.contiguous(sizes_E, x_ZD.shape[0])
  options = transpose_w, num_sms, tiling, interpret
  return _multiply_blocks(x_ZD[None], w_EDF, blocks, *options)[0]


@traced_once("num_sms", "tiling", "interpret")
def multiply_masked(
  x_GCD: jax.Array,
  w_GDF: jax.Array,
  counts_G: jax.Array,
  num_sms: int | None = None,
  tiling: Tiling | None = None,
  interpret=None,
) -> jax.Array:
  """The first counts_G rows of each group times its matrix, 0 in the others."""
  blocks = schedule.masked(counts_G, x_GCD.shape[1])
  return _multiply_blocks(x_GCD, w_GDF, blocks, False, num_sms, tiling, interpret)


def _multiply_blocks(x_GCD, w_EDF, blocks, transpose_w, num_sms, tiling, interpret):
  """Blocks of 128 rows times the matrices that the table `blocks` names."""
  t = tiling or _tiling(w_EDF.shape[1 if transpose_w else 2])
  groups, rows, depth = x_GCD.shape
  experts, columns = w_EDF.shape[0], w_EDF.shape[1 if transpose_w else 2]
  per_group = pl.cdiv(rows, t.rows)
  grid = groups * per_group, pl.cdiv(columns, t.columns)

  def tile(i, block_ref, x_ref, w_ref, y_ref):
    row, column = plgpu.planar_snake(i, grid, 0, t.snake)
    expert, filled = block_ref[0, row], None
    if blocks.shape[0] == 2:
      filled = block_ref[1, row]
    group, row = lax.div(row, per_group), lax.rem(row, per_group)
    at_rows = pl.ds(row * t.rows, t.rows)
    at_columns = pl.ds(column * t.columns, t.columns)
    # A block of no group takes no steps, so its product stays 0 and nothing is read.
    steps = jnp.where(expert < experts, depth // t.depth, 0)

    def operands(k):
      at_depth = pl.ds(k * t.depth, t.depth)
      at_w = (at_columns, at_depth) if transpose_w else (at_depth, at_columns)
      return x_ref.at[group, at_rows, at_depth], w_ref.at[(expert, *at_w)]

    return steps, operands, y_ref.at[group, at_rows, at_columns], filled

  out = jax.ShapeDtypeStruct((groups, rows, columns), x_GCD.dtype)
  run = _persistent_matmul(
    tile, grid[0] * grid[1], out, t, (False, transpose_w), num_sms, interpret
  )
  return run(blocks, x_GCD, w_EDF)


@traced_once("dtype", "num_sms", "tiling", "interpret")
def multiply_rows(
  x_ZD: jax.Array,
  dy_ZF: jax.Array,
  sizes_E: jax.Array,
  dtype: jax.typing.DTypeLike,
  add_to: jax.Array | None = None,
  num_sms: int | None = None,
  tiling: Tiling | None = None,
  interpret=None,
) -> jax.Array:
  """For each group the sum over its rows of x^T dy, [E, D, F]; 0 for empty groups.

  Where `add_to` is given, of that dtype, it is added to, in place if its owner lets go.
  """
  t = tiling or _tiling(dy_ZF.shape[1])
  experts, d, f = sizes_E.shape[0], x_ZD.shape[1], dy_ZF.shape[1]
  grid = pl.cdiv(d, t.rows), pl.cdiv(f, t.columns)

  def tile(i, span_ref, x_ref, dy_ref, dw_ref):
    expert, i = lax.div(i, grid[0] * grid[1]), lax.rem(i, grid[0] * grid[1])
    row, column = plgpu.planar_snake(i, grid, 0, t.snake)
    at_rows = pl.ds(row * t.rows, t.rows)
    at_columns = pl.ds(column * t.columns, t.columns)
    start, size = span_ref[0, expert], span_ref[1, expert]

    def operands(k):
      at_depth = pl.ds(pl.multiple_of(start + k * t.depth, t.depth), t.depth)
      return x_ref.at[at_depth, at_rows], dy_ref.at[at_depth, at_columns]

    out = dw_ref.at[expert, at_rows, at_columns]
    return lax.div(size, t.depth), operands, out, None

  out = jax.ShapeDtypeStruct((experts, d, f), dtype)
  run = _persistent_matmul(
    tile, experts * grid[0] * grid[1], out, t, (True, False), num_sms, interpret, add_to
  )
  return run(schedule.spans(sizes_E), x_ZD, dy_ZF)


def _persistent_matmul(
  tile: Callable,
  tiles: int,
  out: jax.ShapeDtypeStruct,
  t: Tiling,
  transposed: tuple[bool, bool],
  num_sms: int | None,
  interpret,
  add_to: jax.Array | None = None,
) -> Callable[..., jax.Array]:
  """A kernel of (table, a, b) that fills `out` tile by tile, or adds to `add_to`.

  `tile(i, table_ref, a_ref, b_ref, out_ref)` gives the i-th tile's number of steps,
  `operands(k)` (views of a and b for step k), the view of the output it fills and how
  many of its rows hold data (None: all). An operand marked transposed has its
  contracted dimension first (a) or last (b).
  """

  piece = _store_columns(out.dtype)
  if out.shape[-1] <= piece < t.columns:  # one piece's view has no coordinate for more
    raise ValueError(
      f"an output of {out.shape[-1]} columns needs tiles of {piece}: {t}"
    )

  def body(table, a_ref, b_ref, out_ref, out_smem, **ring):
    warpgroup = lax.axis_index("warpgroup")
    ring = _Ring(stages=t.stages, **ring)

    def describe(i):
      return tile(i, table, a_ref, b_ref, out_ref)

    @pl.when(warpgroup == 2)
    def copy():
      plgpu.set_max_registers(40, action="decrease")
      _copy_operands(describe, tiles, ring)

    @pl.when(warpgroup < 2)
    def multiply():
      plgpu.set_max_registers(232, action="increase")
      store = functools.partial(
        _store, smem=out_smem.at[warpgroup], add=add_to is not None
      )
      _multiply_tiles(describe, tiles, ring, transposed, warpgroup, store)

  scratch = _scratch(out.dtype, t, transposed)

  def scoped(*refs):
    pl.run_scoped(
      functools.partial(body, *refs), collective_axes="warpgroup", **scratch
    )

  sms = num_sms or (streaming_multiprocessors() if interpret is None else 2)
  mesh = plgpu.Mesh(
    grid=(sms,), grid_names=("sm",), num_threads=3, thread_name="warpgroup"
  )
  kernel: Any = functools.partial(
    pl.kernel,
    mesh=mesh,
    compiler_params=plgpu.CompilerParams(),
    interpret=interpret,
    name="grouped_matmul",
  )
  if add_to is None:
    return lambda *operands: kernel(scoped, out_type=(out,))(*operands)[0]

  add = kernel(scoped, out_type=())
  return lambda *operands: in_place(lambda sums: add(*operands, sums), add_to)


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
    "out_smem": swizzled((2, 2, _WARPGROUP_ROWS, store_columns), dtype),
    "filled": plgpu.Barrier(num_arrivals=2, num_barriers=t.stages),  # two copies
    "free": plgpu.Barrier(num_arrivals=2, num_barriers=t.stages),  # two warpgroups
  }


@dataclasses.dataclass(frozen=True)
class _Ring:
  """Slots of shared memory, with a barrier each for "filled" and "free again"."""

  a: Any
  b: Any
  filled: Any
  free: Any
  stages: int


def _multiply_tiles(describe, tiles, ring, transposed, warpgroup, store):
  """One warpgroup's part: 64 rows of every tile of this SM."""
  mine = pl.ds(warpgroup * _WARPGROUP_ROWS, _WARPGROUP_ROWS)

  @plgpu.nd_loop((tiles,), collective_axes="sm", init_carry=jnp.int32(0))
  def each_tile(loop, carry):
    steps, _, out_tile, filled = describe(loop.index[0])

    def free(step):
      plgpu.barrier_arrive(ring.free.at[lax.rem(step, ring.stages)])

    def accumulate(acc):
      def step(k, _):
        slot = lax.rem(carry + k, ring.stages)
        plgpu.barrier_wait(ring.filled.at[slot])
        a, b = ring.a.at[slot], ring.b.at[slot]
        a = a.at[:, mine].transpose((1, 0)) if transposed[0] else a.at[mine]
        plgpu.wgmma(acc, a, b.transpose((1, 0)) if transposed[1] else b)
        plgpu.wgmma_wait(1)  # the step before has read its operands to the end
        pl.when(k > 0)(lambda: free(carry + k - 1))

      lax.fori_loop(0, steps, step, None)
      plgpu.wgmma_wait(0)
      pl.when(steps > 0)(lambda: free(carry + steps - 1))
      return acc[...]

    columns = out_tile.shape[1]
    acc = plgpu.WGMMAAccumulatorRef((_WARPGROUP_ROWS, columns))
    product = pl.run_scoped(accumulate, acc)
    if filled is not None:
      row = plgpu.broadcasted_iota(
        jnp.int32, product.shape, 0, layout=plgpu.Layout.WGMMA
      )
      mine_filled = filled - warpgroup * _WARPGROUP_ROWS
      product = jnp.where(row < mine_filled, product, 0.0)
    store(product, out_tile=out_tile.at[mine])
    return carry + steps

  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _copy_operands(describe, tiles, ring):
  """Fills the ring, tile after tile, as fast as its slots come free."""

  def copy_tile(loop, carry):
    steps, operands, *_ = describe(loop.index[0])

    def step(k, _):
      slot = lax.rem(carry + k, ring.stages)

      @pl.when(carry + k >= ring.stages)
      def wait():
        plgpu.barrier_wait(ring.free.at[slot])

      a, b = operands(k)
      plgpu.copy_gmem_to_smem(a, ring.a.at[slot], ring.filled.at[slot])
      plgpu.copy_gmem_to_smem(b, ring.b.at[slot], ring.filled.at[slot])

    lax.fori_loop(0, steps, step, None)
    return carry + steps

  each_tile = plgpu.nd_loop((tiles,), collective_axes="sm", init_carry=jnp.int32(0))
  copied = each_tile(copy_tile)

  def drain(step, _):  # the last slots: every arrival is waited for once
    plgpu.barrier_wait(ring.free.at[lax.rem(step, ring.stages)])

  lax.fori_loop(jnp.maximum(copied - ring.stages, 0), copied, drain, None)


def _store(product, smem, out_tile, add):
  """Casts and stores a warpgroup's product through two slots of shared memory.

  An output of as many columns as one slot has no coordinate for them, so that what lies
  beyond them would be stored upon them: its tiles are no wider.
  """
  columns = smem.shape[-1]
  pieces = product.shape[1] // columns
  for i in range(pieces):
    at_columns = slice(i * columns, (i + 1) * columns)
    # The slot of the piece before may still be read. An odd number of pieces ends with
    # the slot that the next tile begins with.
    plgpu.wait_smem_to_gmem(0 if i == 0 and pieces % 2 else 1, wait_read_only=True)
    smem[i % 2] = product[:, at_columns].astype(smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
      smem.at[i % 2], out_tile.at[:, at_columns], reduction_op="add" if add else None
    )
