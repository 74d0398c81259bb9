"""Grouped matrix product on NVIDIA Hopper, BF16: tiles for `persistent.run`.

Since every group is a multiple of 128 rows, a block of 128 rows has one expert, found
in a small array; no group is split and none is searched for. (JAX ships kernels for
arbitrary groups, `jax.experimental.pallas.ops.gpu.ragged_dot_mgpu`; they unroll over
the groups. The benchmark times both.)

Shapes: Z rows, E experts (groups), D input, F output.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.grouped_matmul import schedule
from kernels_pallas.grouped_matmul.persistent import Tile, Tiling, run
from kernels_pallas.hopper import traced_once
from kernels_pallas.ring import View, of_block

ROW_MULTIPLE = schedule.BLOCK_ROWS


def _tiling(columns: int) -> Tiling:
  """A wider tile than the output of 64 columns would overwrite them: see `run`."""
  return Tiling(columns=64) if columns == 64 else Tiling(cluster=2)


def _alone(t: Tiling, num_sms: int | None, interpret) -> Tiling:
  """Clusters only where the kernel has the whole GPU.

  Beside another kernel two free multiprocessors may not be neighbours.
  """
  beside = num_sms is not None or interpret is not None
  return dataclasses.replace(t, cluster=1) if beside else t


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
  columns = w_EDF.shape[1 if transpose_w else 2]
  t = _alone(tiling or _tiling(columns), num_sms, interpret)
  across = pl.cdiv(columns, t.columns)
  if across % 2:
    t = dataclasses.replace(t, cluster=1)

  def place(i, block_ref):
    block = lax.div(i * t.cluster, across)
    expert, first, count = (block_ref[n, block] for n in range(3))
    i = i - lax.div(first * across, t.cluster)  # in its band
    if t.cluster == 1:
      row, column, shared = lax.rem(i, count), lax.div(i, count), 0
    else:
      second = lax.axis_index("block")
      row, column, is_column = schedule.pair_in_band(i, count, across, second)
      shared = is_column.astype(jnp.int32)
    return _Place(expert, 0, first + row, column, shared)

  blocks = schedule.bands(sizes_E, x_ZD.shape[0], t.snake)
  options = transpose_w, num_sms, interpret
  return _multiply_blocks(x_ZD[None], w_EDF, blocks, place, t, *options)[0]


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
  t = dataclasses.replace(tiling or _tiling(w_GDF.shape[2]), cluster=1)
  blocks = schedule.masked(counts_G, x_GCD.shape[1])
  each = pl.cdiv(x_GCD.shape[1], t.rows)
  grid = blocks.shape[1], pl.cdiv(w_GDF.shape[2], t.columns)

  def place(i, block_ref):
    block, column = plgpu.planar_snake(i, grid, 0, t.snake)
    expert, filled = block_ref[0, block], block_ref[1, block]
    group, row = lax.div(block, each), lax.rem(block, each)
    return _Place(expert, group, row, column, filled=filled)

  return _multiply_blocks(x_GCD, w_GDF, blocks, place, t, False, num_sms, interpret)


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where a tile is, in tiles of its group, and what it is multiplied by."""

  expert: Any
  group: Any
  row: Any
  column: Any
  shared: Any = 0
  filled: Any = None


def _multiply_blocks(
  x_GCD, w_EDF, blocks, place, t: Tiling, transpose_w, num_sms, interpret
):
  """Blocks of 128 rows times matrices; `place(i, blocks)` is that of the i-th tile."""
  groups, rows, depth = x_GCD.shape
  experts, columns = w_EDF.shape[0], w_EDF.shape[1 if transpose_w else 2]

  def tile(i, block_ref, x_ref, w_ref, y_ref):
    at = place(i, block_ref)
    at_rows = pl.ds(at.row * t.rows, t.rows)
    at_columns = pl.ds(at.column * t.columns, t.columns)

    def operands(k):
      at_depth = pl.ds(k * t.depth, t.depth)
      at_w = (at_columns, at_depth) if transpose_w else (at_depth, at_columns)
      x = View(x_ref, (at.group, at_rows, at_depth))
      return x, View(w_ref, (at.expert, *at_w))

    return Tile(
      # A block of no group takes no steps, so its product stays 0, nothing is read.
      steps=jnp.where(at.expert < experts, depth // t.depth, 0),
      operands=operands,
      out=y_ref.at[at.group, at_rows, at_columns],
      shared=at.shared,
      filled=at.filled,
    )

  tiles = blocks.shape[1] * pl.cdiv(columns, t.columns) // t.cluster
  out = jax.ShapeDtypeStruct((groups, rows, columns), x_GCD.dtype)
  fill = run(tile, tiles, out, t, (False, transpose_w), num_sms, interpret)
  return fill(blocks, x_GCD, w_EDF)


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
  t = _alone(tiling or _tiling(dy_ZF.shape[1]), num_sms, interpret)
  experts, d, f = sizes_E.shape[0], x_ZD.shape[1], dy_ZF.shape[1]
  grid = pl.cdiv(d, t.rows * t.cluster), pl.cdiv(f, t.columns)

  def tile(i, span_ref, x_ref, dy_ref, dw_ref):
    expert, i = lax.div(i, grid[0] * grid[1]), lax.rem(i, grid[0] * grid[1])
    row, column = plgpu.planar_snake(i, grid, 0, t.snake)
    at_rows = pl.ds(of_block(row, t.cluster) * t.rows, t.rows)
    at_columns = pl.ds(column * t.columns, t.columns)
    start, size = span_ref[0, expert], span_ref[1, expert]

    def operands(k):
      at_depth = pl.ds(pl.multiple_of(start + k * t.depth, t.depth), t.depth)
      return View(x_ref, (at_depth, at_rows)), View(dy_ref, (at_depth, at_columns))

    out = dw_ref.at[expert, at_rows, at_columns]
    return Tile(lax.div(size, t.depth), operands, out, shared=1)

  out = jax.ShapeDtypeStruct((experts, d, f), dtype)
  fill = run(
    tile, experts * grid[0] * grid[1], out, t, (True, False), num_sms, interpret, add_to
  )
  return fill(schedule.spans(sizes_E), x_ZD, dy_ZF)
