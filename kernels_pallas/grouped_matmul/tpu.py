"""Grouped matrix product on TPU: megablox, which ships with JAX, with tiles by shape.

megablox leaves rows of no group unwritten, so they are zeroed here. Groups of a fixed
capacity have a kernel of their own, which reads no more than the filled rows and the
matrices of groups that have any. FP32 operands are multiplied at the matrix unit's
default precision.

Shapes: Z rows, E experts (groups), D input, F output; G groups of capacity C.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

ROW_MULTIPLE = 128
_LANES = 128


def unsupported(dtype: jax.typing.DTypeLike, d: int, f: int) -> str | None:
  """Why these kernels cannot multiply so, or None when they can."""
  if dtype not in (jnp.bfloat16, jnp.float32):
    return f"multiplies bfloat16 and float32 only, got {jnp.dtype(dtype).name}"
  if d % _LANES or f % _LANES:
    return f"needs D and F that are multiples of {_LANES}, got D={d}, F={f}"
  return None


def multiply(
  x_ZD: jax.Array,
  w_EDF: jax.Array,
  sizes_E: jax.Array,
  transpose_w: bool = False,
  interpret: bool = False,
) -> jax.Array:
  """Row z of group e becomes x_z @ w_e (or @ w_e^T); rows of no group become 0."""
  rows, depth = x_ZD.shape
  columns = w_EDF.shape[1 if transpose_w else 2]
  widest = 2048 // x_ZD.dtype.itemsize
  y_ZF = gmm(
    x_ZD,
    w_EDF,
    sizes_E.astype(jnp.int32),
    preferred_element_type=x_ZD.dtype,
    tiling=(
      _row_tile(rows, w_EDF.shape[0]),
      _tile(depth, widest),
      _tile(columns, widest),
    ),
    transpose_rhs=transpose_w,
    interpret=interpret,
  )
  return jnp.where(jnp.arange(rows)[:, None] < sizes_E.sum(), y_ZF, 0)


def multiply_rows(
  x_ZD: jax.Array,
  dy_ZF: jax.Array,
  sizes_E: jax.Array,
  dtype: jax.typing.DTypeLike,
  interpret: bool = False,
) -> jax.Array:
  """For each group the sum over its rows of x^T dy, [E, D, F]; 0 for empty groups."""
  rows, d = x_ZD.shape
  widest = 2048 // x_ZD.dtype.itemsize
  return tgmm(
    x_ZD.T,
    dy_ZF,
    sizes_E.astype(jnp.int32),
    preferred_element_type=jnp.dtype(dtype),
    tiling=(
      _row_tile(rows, sizes_E.shape[0]),
      _tile(d, widest // 2),
      _tile(dy_ZF.shape[1], widest),
    ),
    interpret=interpret,
  )


def multiply_masked(
  x_GCD: jax.Array, w_GDF: jax.Array, counts_G: jax.Array, interpret: bool = False
) -> jax.Array:
  """The first counts_G rows of each group times its matrix, 0 in the others."""
  (groups, capacity, depth), columns = x_GCD.shape, w_GDF.shape[2]
  widest = 2048 // x_GCD.dtype.itemsize
  rows, column_tile = min(256, capacity), _tile(columns, widest)
  step = next(t for t in range(min(widest, depth), 0, -_LANES) if depth % t == 0)
  grid = groups, pl.cdiv(capacity, rows), pl.cdiv(columns, column_tile), depth // step

  def body(counts_ref, x_ref, w_ref, y_ref, sum_ref):
    k = pl.program_id(3)
    left = counts_ref[pl.program_id(0)] - pl.program_id(1) * rows  # rows of this tile

    @pl.when(k == 0)
    def clear():
      sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(left > 0)
    def add():
      sum_ref[...] += jnp.dot(x_ref[0], w_ref[0], preferred_element_type=sum_ref.dtype)

    @pl.when(k == grid[3] - 1)
    def store():
      own = lax.broadcasted_iota(jnp.int32, sum_ref.shape, 0) < left
      y_ref[0] = jnp.where(own, sum_ref[...], 0).astype(y_ref.dtype)

  def if_filled(g, c, counts_ref, *places):
    """A tile of no rows asks for the same place always, so nothing is copied for it."""
    some = counts_ref[g] > c * rows
    return [jnp.where(some, place, 0) for place in places]

  return pl.pallas_call(
    body,
    out_shape=jax.ShapeDtypeStruct((groups, capacity, columns), x_GCD.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=grid,
      in_specs=[
        pl.BlockSpec(
          (1, rows, step), lambda g, c, f, k, n: (g, *if_filled(g, c, n, c, k))
        ),
        pl.BlockSpec(
          (1, step, column_tile), lambda g, c, f, k, n: (g, *if_filled(g, c, n, k, f))
        ),
      ],
      out_specs=pl.BlockSpec((1, rows, column_tile), lambda g, c, f, k, n: (g, c, f)),
      scratch_shapes=[pltpu.VMEM((rows, column_tile), jnp.float32)],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
    ),
    interpret=interpret,
  )(counts_G.astype(jnp.int32), x_GCD, w_GDF)


def _row_tile(rows: int, experts: int) -> int:
  """Rows of a tile: at most a quarter of a mean group, for a tile that straddles two
  groups is multiplied for each; a divisor of all rows, as megablox demands."""
  for tile in (512, 256):
    if rows % tile == 0 and rows >= 4 * tile * experts:
      return tile
  if rows % 128:
    raise ValueError(f"grouped_matmul on TPU needs Z a multiple of 128, got {rows}")
  return 128


def _tile(size: int, widest: int) -> int:
  """The widest tile that pads `size` by less than an eighth."""
  for tile in range(min(widest, size), _LANES, -_LANES):
    if -size % tile < size / 8:
      return tile
  return _LANES
