"""Block-scaled FP8 products on NVIDIA Hopper: tiles for `persistent.run`.

Dense and grouped products are one: a block of 128 rows has one group, and so one
matrix; the dense product is the case of one group.

Shapes: M rows (tokens), K contraction, N output, E groups; I and J the two outputs of
a weight gradient; a lower-case letter is that dimension / 128, rounded up. `sum_bits`
is as persistent.run has it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.fp8_matmul import tilings
from kernels_pallas.fp8_matmul.persistent import (
  BLOCK,
  WARPGROUP_ROWS,
  Tile,
  Tiling,
  granule,
  run,
)
from kernels_pallas.hopper import traced_once, zero_of_each_thread
from kernels_pallas.ring import View, of_block

_TMA_ROWS = 8  # a tile of TMA's; fewer rows than one are fine too
_TMA_TOKENS = 128
_APART = 8  # clusters, of which most often one a GPC; 7 and 16 were as good


def unsupported(n: int, k: int) -> str | None:
  """Why these kernels cannot multiply [M, K] by [N, K], or None when they can."""
  if n % 64 or k % 64:
    return f"needs N and K that are multiples of 64, got N={n}, K={k}: pad them"
  return None


@traced_once("out_dtype", "num_sms", "tiling", "sum_bits", "interpret")
def multiply(
  a_MK: jax.Array,
  sa_kM: jax.Array,
  b_ENK: jax.Array,
  sb_Enk: jax.Array,
  blocks: jax.Array | None = None,
  *,
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  num_sms: int | None = None,
  tiling: Tiling | None = None,
  sum_bits: int | None = None,
  interpret=None,
) -> jax.Array:
  """Each row times its block's matrix; `blocks` as multiply_groups has it."""
  rows = a_MK.shape[0]
  pad = -rows % _TMA_ROWS
  columns, depth = b_ENK.shape[1:]
  clusters = num_sms is None and interpret is None and sum_bits is None
  c_1MN = multiply_groups(
    jnp.pad(a_MK, ((0, pad), (0, 0)))[None] if pad else a_MK[None],
    (jnp.pad(sa_kM, ((0, 0), (0, pad))) if pad else sa_kM)[:, None],
    b_ENK,
    sb_Enk,
    blocks,
    out_dtype=out_dtype,
    num_sms=num_sms,
    tiling=tiling or tilings.forward(rows, columns, depth, clusters),
    sum_bits=sum_bits,
    interpret=interpret,
  )
  return c_1MN[0, :rows] if pad else c_1MN[0]


@traced_once("out_dtype", "num_sms", "tiling", "sum_bits", "interpret")
def multiply_groups(
  a_GCK: jax.Array,
  sa_kGC: jax.Array,
  b_ENK: jax.Array,
  sb_Enk: jax.Array,
  blocks: jax.Array | None = None,
  *,
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  num_sms: int | None = None,
  tiling: Tiling | None = None,
  sum_bits: int | None = None,
  interpret=None,
) -> jax.Array:
  """Each row times its block's matrix, [G, C, N].

  Args:
    a_GCK: rows in G pieces of C, a multiple of 8; blocks of 128 rows start anew in
      each piece.
    blocks: a table of grouped_matmul/schedule.py, for each block of rows the index of
      its matrix (E for none: zeros, unread). One row: blocks of 128 rows. Two: also how
      many of its rows hold data. Three, for tiles of three warpgroups: where it begins
      and how many of them it keeps busy. None: matrix 0.
  """
  (pieces, rows, depth), (experts, columns) = a_GCK.shape, b_ENK.shape[:2]
  t = _alone(tiling or tilings.masked(pieces * rows, columns), num_sms, interpret)
  t = tilings.of_steps(t, pl.cdiv(depth, BLOCK))
  form = 0 if blocks is None else blocks.shape[0]  # rows of the table
  if form and (t.warpgroups > 2) != (form == 3):
    raise ValueError(f"a table of {form} rows has no tiles of {t}")
  if blocks is None and pieces > 1:
    raise ValueError(f"{pieces} pieces of rows need a table of blocks")
  if form and t.split > 1:
    raise ValueError(f"tiles of a table of blocks are not split: {t}")
  per_piece, across = pl.cdiv(rows, t.rows), tilings.across(columns, t)
  if blocks is None:
    cut = tilings.cut(rows, columns, t, num_sms)
  else:
    cut = tilings.Cut(blocks.shape[1])
  row_blocks = cut.whole + cut.lower
  width, last_scale = granule(t.columns), sb_Enk.shape[1] - 1

  def tile(i, *refs):
    *group_refs, a_ref, sa_ref, b_ref, sb_ref, c_ref = refs
    piece, group, filled, steps = 0, 0, None, pl.cdiv(depth, BLOCK)
    zero = zero_of_each_thread() if form and interpret is None else 0
    if not form:
      start, column, busy = _place(i, cut, across, t)
    else:
      row, column = plgpu.planar_snake(i, (row_blocks, across), 0, t.snake)
      piece, start = lax.div(row, per_piece), lax.rem(row, per_piece) * t.rows
      group, busy = group_refs[0][0, row], None
      # A block of no group takes no steps, so its product stays 0, nothing is read.
      steps = jnp.where(group < experts, steps, 0)
    if form == 2:
      filled = group_refs[0][1, row]
    if form == 3:
      piece, start = 0, group_refs[0][1, row] * WARPGROUP_ROWS
      busy = group_refs[0][2, row]
    column = of_block(column, t.cluster)
    at_rows = pl.ds(start, t.rows)
    at_columns = pl.ds(column * t.columns, t.columns)

    def operands(k):
      at_depth = pl.ds(k * BLOCK, t.fetched * BLOCK)
      a = View(a_ref, (piece, at_rows, at_depth), shared=True)
      return a, View(b_ref, (group, at_columns, at_depth))

    def column_scales(k):
      starts = range(0, t.columns, width)
      blocks = [lax.div(column * t.columns + s, BLOCK) for s in starts]
      known = jnp.minimum(group, experts - 1)  # they are read ahead
      return [sb_ref[known, jnp.minimum(n, last_scale) + zero, k] for n in blocks]

    def row_scales(k):
      at_steps = k if t.fetched == 1 else pl.ds(k, t.fetched)
      return View(sa_ref, (at_steps, piece, at_rows))

    return Tile(
      steps=jnp.int32(steps),
      operands=operands,
      row_scales=row_scales,
      column_scales=column_scales,
      out=c_ref.at[piece, at_rows, at_columns],
      rows=filled,
      busy=busy,
    )

  fill = run(
    tile,
    row_blocks * across,
    jax.ShapeDtypeStruct((pieces, rows, columns), out_dtype),
    t,
    scale_each_column=False,
    num_sms=num_sms,
    sum_bits=sum_bits,
    steps=pl.cdiv(depth, BLOCK),
    swizzle=BLOCK if depth % BLOCK == 0 else BLOCK // 2,
    interpret=interpret,
  )
  if blocks is None:
    return fill(a_GCK, sa_kGC, b_ENK, sb_Enk)
  return fill(blocks.astype(jnp.int32), a_GCK, sa_kGC, b_ENK, sb_Enk)


@traced_once("num_sms", "tiling", "sum_bits", "interpret")
def multiply_tokens(
  a_IM: jax.Array,
  sa_mI: jax.Array,
  b_JM: jax.Array,
  sb_mJ: jax.Array,
  spans_2E: jax.Array | None = None,
  c_EIJ: jax.Array | None = None,
  *,
  num_sms: int | None = None,
  tiling: Tiling | None = None,
  sum_bits: int | None = None,
  interpret=None,
) -> jax.Array:
  """The weight gradient, FP32 [E, I, J]: a b^T over each group's tokens.

  Args:
    spans_2E: first token and number of tokens of each group, multiples of 128.
      None: one group of all tokens.
    c_EIJ: sums to add to, in place where the caller lets go of them.
  """
  (i_size, tokens), j_size = a_IM.shape, b_JM.shape[0]
  experts = 1 if spans_2E is None else spans_2E.shape[1]
  t = tiling or tilings.weight_gradient(i_size, j_size, tokens)
  t = _alone(t, num_sms, interpret)
  cut = tilings.remainder(i_size, t)
  if experts == 1:
    cut = tilings.cut(i_size, j_size, t, num_sms)
  across = tilings.across(j_size, t)

  def tile(i, *refs):
    *span_refs, a_ref, sa_ref, b_ref, sb_ref, c_ref = refs
    expert, i = _of_expert(i, experts, cut.whole * across, cut.lower * across)
    row, column, busy = _place(i, cut, across, t)
    start, steps = 0, pl.cdiv(tokens, BLOCK)
    if span_refs:
      start = lax.div(span_refs[0][0, expert], BLOCK)
      steps = lax.div(span_refs[0][1, expert], BLOCK)
    column = of_block(column, t.cluster)
    at_rows = pl.ds(row, t.rows)
    at_columns = pl.ds(column * t.columns, t.columns)

    def operands(k):
      at_tokens = pl.ds((start + k) * BLOCK, BLOCK)
      a = View(a_ref, (at_rows, at_tokens), shared=True)
      return a, View(b_ref, (at_columns, at_tokens))

    return Tile(
      steps=jnp.int32(steps),
      operands=operands,
      row_scales=lambda k: View(sa_ref, (start + k, at_rows)),
      column_scales=lambda k: View(sb_ref, (start + k, at_columns)),
      out=c_ref.at[expert, at_rows, at_columns],
      busy=busy,
    )

  fill = run(
    tile,
    experts * (cut.whole + cut.lower) * across,
    jax.ShapeDtypeStruct((experts, i_size, j_size), jnp.float32),
    t,
    scale_each_column=True,
    add_to=c_EIJ,
    num_sms=num_sms,
    sum_bits=sum_bits,
    steps=pl.cdiv(tokens, BLOCK) if spans_2E is None else None,
    interpret=interpret,
  )
  a_IM, b_JM = _pad_last(a_IM), _pad_last(b_JM)
  if spans_2E is None:
    return fill(a_IM, sa_mI, b_JM, sb_mJ)
  return fill(spans_2E.astype(jnp.int32), a_IM, sa_mI, b_JM, sb_mJ)


def _alone(t: Tiling, num_sms: int | None, interpret) -> Tiling:
  """Clusters only where the kernel has the whole GPU.

  Beside another kernel two free multiprocessors may not be neighbours.
  """
  if num_sms is None and interpret is None:
    return t
  return dataclasses.replace(t, cluster=1, split=1)


def _place(i, cut: tilings.Cut, across: int, t: Tiling):
  """First row, column / t.columns and busy warpgroups (None: all) of the i-th tile."""
  if t.split > 1 and cut.whole > 1:
    row, column = _side_by_side(i, cut.whole, across)
  else:
    row, column = plgpu.planar_snake(i, (max(cut.whole, 1), across), 0, t.snake)
  if not cut.lower:
    return row * t.rows, column, None
  whole_tiles = cut.whole * across
  low, low_column = plgpu.planar_snake(
    jnp.maximum(i - whole_tiles, 0), (cut.lower, across), 0, t.snake
  )
  low = cut.whole * t.rows + low * cut.busy * WARPGROUP_ROWS
  is_whole = i < whole_tiles
  return (
    jnp.where(is_whole, row * t.rows, low),
    jnp.where(is_whole, column, low_column),
    jnp.where(is_whole, t.warpgroups, cut.busy),
  )


def _side_by_side(i, down: int, across: int):
  """Row and column of a tile; those of a column are so many clusters apart that they
  are most often run side by side, so that what one fetches the others find."""
  first = lax.div(i, _APART * down) * _APART
  wide = jnp.minimum(across - first, _APART)  # columns that are walked together
  rest = lax.rem(i, _APART * down)
  row = sum((rest >= n * wide).astype(jnp.int32) for n in range(1, down))
  return row, first + rest - row * wide


def _of_expert(i, experts: int, whole: int, lower: int):
  """Whose tile the i-th is, and its number there: all whole tiles come first."""
  if not (whole and lower) or experts == 1:
    return lax.div(i, whole + lower), lax.rem(i, whole + lower)
  low = i - experts * whole
  expert = jnp.where(low < 0, lax.div(i, whole), lax.div(low, lower))
  return expert, jnp.where(low < 0, lax.rem(i, whole), whole + lax.rem(low, lower))


def _pad_last(x_IM: jax.Array) -> jax.Array:
  """Tokens up to a multiple of what TMA wants: often none are missing."""
  missing = -x_IM.shape[1] % _TMA_TOKENS
  return jnp.pad(x_IM, ((0, 0), (0, missing))) if missing else x_IM
