"""Block-scaled FP8 products on NVIDIA Hopper: tiles for `persistent.run`.

Dense and grouped products are one: a block of 128 rows has one group, and so one
matrix; the dense product is the case of one group.

Shapes: M rows (tokens), K contraction, N output, E groups; I and J the two outputs of
a weight gradient; a lower-case letter is that dimension / 128, rounded up. `sum_bits`
is as persistent.run has it.
"""

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
from kernels_pallas.hopper import traced_once

_TMA_ROWS = 8  # a tile of TMA's; fewer rows than one are fine too
_TMA_TOKENS = 128


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
  c_1MN = multiply_groups(
    jnp.pad(a_MK, ((0, pad), (0, 0)))[None] if pad else a_MK[None],
    (jnp.pad(sa_kM, ((0, 0), (0, pad))) if pad else sa_kM)[:, None],
    b_ENK,
    sb_Enk,
    blocks,
    out_dtype=out_dtype,
    num_sms=num_sms,
    tiling=tiling or tilings.forward(rows, columns, depth),
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
  t = tiling or tilings.masked(pieces * rows, columns)
  form = 0 if blocks is None else blocks.shape[0]  # rows of the table
  if form and (t.warpgroups > 2) != (form == 3):
    raise ValueError(f"a table of {form} rows has no tiles of {t}")
  if blocks is None and pieces > 1:
    raise ValueError(f"{pieces} pieces of rows need a table of blocks")
  per_piece, across = pl.cdiv(rows, t.rows), pl.cdiv(columns, t.columns)
  if blocks is None:
    cut = tilings.cut(rows, columns, t, num_sms)
  else:
    cut = tilings.Cut(blocks.shape[1])
  row_blocks = cut.whole + cut.lower
  width, last_scale = granule(t.columns), sb_Enk.shape[1] - 1

  def tile(i, *refs):
    *group_refs, a_ref, sa_ref, b_ref, sb_ref, c_ref = refs
    piece, group, filled, steps = 0, 0, None, pl.cdiv(depth, BLOCK)
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
    at_rows = pl.ds(start, t.rows)
    at_columns = pl.ds(column * t.columns, t.columns)

    def operands(k):
      at_depth = pl.ds(k * BLOCK, BLOCK)
      return a_ref.at[piece, at_rows, at_depth], b_ref.at[group, at_columns, at_depth]

    def column_scales(k):
      starts = range(0, t.columns, width)
      blocks = [lax.div(column * t.columns + s, BLOCK) for s in starts]
      return [sb_ref[group, jnp.minimum(n, last_scale), k] for n in blocks]

    return Tile(
      steps=jnp.int32(steps),
      operands=operands,
      row_scales=lambda k: sa_ref.at[k, piece, at_rows],
      column_scales=column_scales,
      out=c_ref.at[piece, at_rows, at_columns],
      rows=filled,
      busy=busy,
      copied=_copied(busy, in_groups=form > 0),
    )

  fill = run(
    tile,
    row_blocks * across,
    jax.ShapeDtypeStruct((pieces, rows, columns), out_dtype),
    t,
    scale_each_column=False,
    num_sms=num_sms,
    sum_bits=sum_bits,
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
  cut = tilings.remainder(i_size, t)
  if experts == 1:
    cut = tilings.cut(i_size, j_size, t, num_sms)
  across = pl.cdiv(j_size, t.columns)
  tiles = (cut.whole + cut.lower) * across  # of one weight

  def tile(i, *refs):
    *span_refs, a_ref, sa_ref, b_ref, sb_ref, c_ref = refs
    expert = lax.div(i, tiles)
    row, column, busy = _place(lax.rem(i, tiles), cut, across, t)
    start, steps = 0, pl.cdiv(tokens, BLOCK)
    if span_refs:
      start = lax.div(span_refs[0][0, expert], BLOCK)
      steps = lax.div(span_refs[0][1, expert], BLOCK)
    at_rows = pl.ds(row, t.rows)
    at_columns = pl.ds(column * t.columns, t.columns)

    def operands(k):
      at_tokens = pl.ds((start + k) * BLOCK, BLOCK)
      return a_ref.at[at_rows, at_tokens], b_ref.at[at_columns, at_tokens]

    return Tile(
      steps=jnp.int32(steps),
      operands=operands,
      row_scales=lambda k: sa_ref.at[start + k, at_rows],
      column_scales=lambda k: sb_ref.at[start + k, at_columns],
      out=c_ref.at[expert, at_rows, at_columns],
      busy=busy,
      copied=_copied(busy, in_groups=experts > 1),
    )

  fill = run(
    tile,
    experts * tiles,
    jax.ShapeDtypeStruct((experts, i_size, j_size), jnp.float32),
    t,
    scale_each_column=True,
    add_to=c_EIJ,
    num_sms=num_sms,
    sum_bits=sum_bits,
    interpret=interpret,
  )
  a_IM, b_JM = _pad_last(a_IM), _pad_last(b_JM)
  if spans_2E is None:
    return fill(a_IM, sa_mI, b_JM, sb_mJ)
  return fill(spans_2E.astype(jnp.int32), a_IM, sa_mI, b_JM, sb_mJ)


def _place(i, cut: tilings.Cut, across: int, t: Tiling):
  """First row, column / t.columns and busy warpgroups (None: all) of the i-th tile."""
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


def _copied(busy, in_groups: bool):
  """Warpgroups whose rows are copied to a tile that keeps `busy` of them.

  In a wave of lower tiles copying is what takes time. Between whole tiles, as groups
  have them, copying less took as long or up to 4% longer on H200s.
  """
  return None if in_groups else busy


def _pad_last(x_IM: jax.Array) -> jax.Array:
  """Tokens up to a multiple of what TMA wants: often none are missing."""
  missing = -x_IM.shape[1] % _TMA_TOKENS
  return jnp.pad(x_IM, ((0, 0), (0, missing))) if missing else x_IM
