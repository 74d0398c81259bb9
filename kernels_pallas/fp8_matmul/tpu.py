"""Block-scaled FP8 products on TPU, dense and grouped: a Pallas kernel.

Codes are widened to BF16 in VMEM, which holds e4m3 exactly, and multiplied by the
matrix unit, which sums in FP32; each 128 of the contraction is then scaled and added
up. So it runs on TPUs without FP8 (v5p), at BF16's speed; TPUs with it gain memory
traffic only. The groups' table is as on the GPU: a block of 128 rows has one group.

Shapes: M rows (tokens), K contraction, N output, E groups; I and J the two outputs of
a weight gradient; a lower-case letter is that dimension / 128, rounded up.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK = 128


def unsupported(n: int, k: int) -> str | None:
  """Nothing is: ragged blocks are padded."""
  del n, k


def multiply(
  a_MK: jax.Array,
  sa_kM: jax.Array,
  b_ENK: jax.Array,
  sb_Enk: jax.Array,
  group_m: jax.Array | None = None,
  *,
  out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
  num_sms: int | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Each row times its block's matrix, [M, N].

  Args:
    group_m: for each block of 128 rows the index of its matrix, E for none: zeros.
      None: matrix 0.
    num_sms: for GPUs; not used.
  """
  del num_sms
  (rows, _), (experts, columns, _) = a_MK.shape, b_ENK.shape
  a_MK, b_ENK = _pad_last(a_MK), _pad_last(b_ENK)
  depth = a_MK.shape[1]
  row_tile = BLOCK if group_m is not None else _tile(rows, 512)
  column_tile, depth_tile = _tile(columns, 512), _divisor(depth)
  grid = pl.cdiv(rows, row_tile), pl.cdiv(columns, column_tile), depth // depth_tile
  if group_m is None:
    group_m = jnp.zeros(grid[:1], jnp.int32)
  # A scale a column and 128 of K: lanes are what the kernel can broadcast along.
  sb_Ek1N = jnp.repeat(sb_Enk, BLOCK, axis=1)[:, :columns].swapaxes(1, 2)[:, :, None]

  def body(group_ref, a_ref, sa_ref, b_ref, sb_ref, c_ref, sum_ref):
    step, group = pl.program_id(2), group_ref[pl.program_id(0)]

    @pl.when(step == 0)
    def clear():
      sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(group < experts)
    def add():
      for i in range(depth_tile // BLOCK):
        at = pl.ds(i * BLOCK, BLOCK)
        sum_ref[...] += _scaled(a_ref[:, at], sa_ref[i], b_ref[0, :, at], sb_ref[0, i])

    @pl.when(step == grid[2] - 1)
    def store():
      c_ref[...] = sum_ref[...].astype(c_ref.dtype)

  def of_group(i, j, k, group_ref):
    """Matrix, column and depth; a block of no group asks for the same one always, so
    that nothing is copied for it."""
    some = group_ref[i] < experts
    place = jnp.where(some, j, 0), jnp.where(some, k, 0)
    return jnp.minimum(group_ref[i], experts - 1), *place

  def rows_at(i, j, k, group_ref):
    return i, of_group(i, j, k, group_ref)[2]

  def scales_at(i, j, k, group_ref):
    matrix, column, step = of_group(i, j, k, group_ref)
    return matrix, step, 0, column

  scales = depth_tile // BLOCK
  call = _call(
    body,
    grid,
    jax.ShapeDtypeStruct((rows, columns), out_dtype),
    [
      pl.BlockSpec((row_tile, depth_tile), rows_at),
      pl.BlockSpec((scales, 1, row_tile), lambda i, j, k, g: (k, 0, i)),
      pl.BlockSpec((1, column_tile, depth_tile), of_group),
      pl.BlockSpec((1, scales, 1, column_tile), scales_at),
    ],
    pl.BlockSpec((row_tile, column_tile), lambda i, j, k, g: (i, j)),
    [pltpu.VMEM((row_tile, column_tile), jnp.float32)],
    interpret,
  )
  return call(group_m, a_MK, sa_kM[:, None], b_ENK, sb_Ek1N)


def multiply_tokens(
  a_IM: jax.Array,
  sa_mI: jax.Array,
  b_JM: jax.Array,
  sb_mJ: jax.Array,
  sizes_E: jax.Array | None = None,
  c_EIJ: jax.Array | None = None,
  *,
  num_sms: int | None = None,
  interpret: bool = False,
) -> jax.Array:
  """The weight gradient, FP32 [E, I, J]: a b^T over each group's tokens, added to c.

  Args:
    sizes_E: tokens of each group, multiples of 128. None: one group of all.
    num_sms: for GPUs; not used.
  """
  del num_sms
  a_IM, b_JM = _pad_last(a_IM), _pad_last(b_JM)
  (i_size, tokens), j_size = a_IM.shape, b_JM.shape[0]
  depth = _divisor(tokens) if sizes_E is None else BLOCK
  if sizes_E is None:
    sizes_E = jnp.full((1,), tokens, jnp.int32)
  experts, end_E = len(sizes_E), jnp.cumsum(sizes_E)
  first_m = jnp.arange(tokens // depth) * depth
  group_m = jnp.searchsorted(end_E, first_m, side="right", method="compare_all")
  i_tile, j_tile = _tile(i_size, 512), _tile(j_size, 512)
  grid = pl.cdiv(i_size, i_tile), pl.cdiv(j_size, j_tile), tokens // depth

  def body(group_ref, a_ref, sa_ref, b_ref, sb_ref, dw_ref):
    step = pl.program_id(2)
    group, before = group_ref[step], group_ref[jnp.maximum(step - 1, 0)]

    @pl.when((step == 0) | (group != before))
    def clear():
      dw_ref[...] = jnp.zeros_like(dw_ref)

    @pl.when(group < experts)
    def add():
      for i in range(depth // BLOCK):
        at = pl.ds(i * BLOCK, BLOCK)
        dw_ref[0] += _scaled(a_ref[:, at], sa_ref[i], b_ref[:, at], sb_ref[i])

  call = _call(
    body,
    grid,
    jax.ShapeDtypeStruct((experts + 1, i_size, j_size), jnp.float32),
    [
      pl.BlockSpec((i_tile, depth), lambda i, j, k, g: (i, k)),
      pl.BlockSpec((depth // BLOCK, 1, i_tile), lambda i, j, k, g: (k, 0, i)),
      pl.BlockSpec((j_tile, depth), lambda i, j, k, g: (j, k)),
      pl.BlockSpec((depth // BLOCK, 1, j_tile), lambda i, j, k, g: (k, 0, j)),
    ],
    # Tokens of no group go to a place of their own, which nobody reads.
    pl.BlockSpec((1, i_tile, j_tile), lambda i, j, k, g: (g[k], i, j)),
    [],
    interpret,
  )
  group_m = group_m.astype(jnp.int32)
  dw_EIJ = call(group_m, a_IM, sa_mI[:, None], b_JM, sb_mJ[:, None])[:experts]
  dw_EIJ = jnp.where((sizes_E > 0)[:, None, None], dw_EIJ, 0)
  return dw_EIJ if c_EIJ is None else c_EIJ + dw_EIJ


def _scaled(a, sa, b, sb):
  """Product over 128 of the contraction, FP32, times the scales of rows and columns."""
  product = lax.dot_general(
    a.astype(jnp.bfloat16),
    b.astype(jnp.bfloat16),
    (((1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  # A row of scales [1, rows] as a column, repeated along 128 lanes.
  by_row = jnp.broadcast_to(sa, (BLOCK, sa.shape[1])).T
  by_row = jnp.concatenate([by_row] * (product.shape[1] // BLOCK), axis=1)
  return product * by_row * sb


def _call(body, grid, out, in_specs, out_spec, scratch, interpret):
  return pl.pallas_call(
    body,
    out_shape=out,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=grid,
      in_specs=in_specs,
      out_specs=out_spec,
      scratch_shapes=scratch,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    ),
    interpret=interpret,
  )


def _pad_last(x: jax.Array) -> jax.Array:
  """Zeros at the end of the contraction, up to a multiple of 128; often none."""
  missing = -x.shape[-1] % BLOCK
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def _divisor(depth: int) -> int:
  """The largest tile of at most 1024 that divides a multiple of 128."""
  return next(t for t in (1024, 512, 384, 256, BLOCK) if depth % t == 0)


def _tile(size: int, widest: int) -> int:
  """The widest multiple of 128 that pads `size` by less than an eighth."""
  for tile in range(widest, BLOCK, -BLOCK):
    if -size % tile < size / 8:
      return tile
  return BLOCK
