"""The Mosaic GPU kernel behind every tile quantiser on Hopper.

A thread block owns one 128x128 tile of positions. TMA brings the sources' tiles to
shared memory; two warpgroups then walk over them in steps of 32, once along rows and,
where columns are wanted too, once more along the transpose, which `ldmatrix` reads
transposed: in either direction a tile of 128 values is a row, four lanes hold it, and
four consecutive codes of the output come from one lane pair. So the two directions are
one piece of code, and what is computed from the sources (SwiGLU) is computed twice
rather than transposed in FP32. Codes leave through shared memory by TMA, which also
pads ragged edges with zeros on the way in and drops them on the way out. Several thread
blocks on an SM hide each other's latencies.

x / s is rounded once in FP32, at the price of a product and two fused multiply-adds: a
quotient from the reciprocal, and one correction by its exact remainder.

Shapes: M rows, K columns; a lower-case letter is that dimension divided by 128,
rounded up. V is the number of values computed at each position.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir.dialects import math as mlir_math

from kernels_pallas.quantize import reference
from kernels_pallas.quantize.reference import TILE, Quantized

STEP = 32  # rows, or columns of the transpose, that a warpgroup takes at once
WARPGROUPS = 2
ORDER = ("m", "k")  # of tiles; the last is the fastest
SHARE = TILE // WARPGROUPS  # of a tile's rows, for one warpgroup

# A warp holds 8 of a step's 32 rows; lanes, 4 to a row, hold pairs of neighbours.
LAYOUT = plgpu.Layout.TILED(
  plgpu.Tiling(((STEP, 8), (8, 8), (2,))),
  warp_dims=(-5,),
  lane_dims=(-3, -2),
  vector_dim=-1,
)


@dataclasses.dataclass(frozen=True)
class Direction:
  """What to write along rows, or along columns.

  `values(tiles, gate)` makes the FP32 values [32, 128] to quantise from those of the
  sources and of the gate, and a value to sum along rows or None. Values side by side
  make an output: `outputs` counts them. `passes` splits the outputs where registers do
  not hold the values of all; each pass computes from the sources anew.
  """

  passes: tuple[tuple[Callable, int], ...]

  @property
  def outputs(self) -> tuple[int, ...]:
    return tuple(count for _, count in self.passes)


@dataclasses.dataclass(frozen=True)
class Codes:
  """How codes are made."""

  dtype: Any
  power_of_two: bool
  interpreted: bool  # on a machine without a GPU


def quantize_tiles(
  sources: Sequence[tuple[jax.Array, int]],
  gate_M: jax.Array | None,
  rows: jax.Array | int | None,
  by_rows: Direction | None,
  by_columns: Direction | None,
  *,
  columns: int,
  sums: bool = False,
  power_of_two: bool,
  dtype: jax.typing.DTypeLike,
  interpret=None,
) -> tuple[list[Quantized], list[Quantized], jax.Array | None]:
  """Runs the kernel.

  Args:
    sources: BF16 matrices with M rows, each with the first of the tile columns read.
    gate_M: FP32 factor of each row, or None.
    rows: number of valid rows, or None.
    by_rows, by_columns: what to write in either direction.
    columns: K, of a source and of each value.
    sums: whether the first value function's second result is summed along each row.

  Returns:
    Quantised outputs along rows (V K columns), along columns (V K rows), and the sums.
  """
  M, K = sources[0][0].shape[0], columns
  m, k = pl.cdiv(M, TILE), pl.cdiv(K, TILE)
  args = [array for array, _ in sources]
  args += [] if gate_M is None else [jnp.pad(gate_M, (0, -M % TILE))]
  args += [] if rows is None else [jnp.asarray(rows, jnp.int32).reshape(1)]
  row_outputs = by_rows.outputs if by_rows else ()
  column_outputs = by_columns.outputs if by_columns else ()
  # Scales are written for whole tiles: M and K rounded up.
  out = [
    part
    for V in row_outputs
    for part in (
      jax.ShapeDtypeStruct((M, V * K), dtype),
      jax.ShapeDtypeStruct((V * k, m * TILE), jnp.float32),
    )
  ]
  out += [
    part
    for V in column_outputs
    for part in (
      jax.ShapeDtypeStruct((V * K, M), dtype),
      jax.ShapeDtypeStruct((m, V * k * TILE), jnp.float32),
    )
  ]
  out += [jax.ShapeDtypeStruct((k, m * TILE), jnp.float32)] if sums else []
  codes = Codes(jnp.dtype(dtype), power_of_two, interpreted=interpret is not None)
  slots = max(2, *row_outputs, *column_outputs)

  def body(*refs):
    refs = list(refs)
    inputs = [(refs.pop(0), offset) for _, offset in sources]
    gate_ref = None if gate_M is None else refs.pop(0)
    rows_ref = None if rows is None else refs.pop(0)
    row_refs = [(refs.pop(0), refs.pop(0)) for _ in row_outputs]
    column_refs = [(refs.pop(0), refs.pop(0)) for _ in column_outputs]
    sums_ref = refs.pop(0) if sums else None
    *tiles, staging, loaded = refs
    tile = _Tile(tiles, gate_ref, rows_ref, staging, slots, k, codes)
    tile.load(inputs, loaded)
    if by_rows:
      tile.write(by_rows, row_refs, sums_ref, transposed=False)
    if by_columns:
      tile.write(by_columns, column_refs, None, transposed=True)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  results = plgpu.kernel(
    body,
    out_type=out,
    scratch_types=[
      *[swizzled((TILE, TILE), jnp.bfloat16, 64) for _ in sources],
      swizzled((WARPGROUPS, slots, STEP, TILE), dtype, 128),
      plgpu.Barrier(num_arrivals=WARPGROUPS * len(sources)),
    ],
    grid=tuple({"m": m, "k": k}[name] for name in ORDER),
    grid_names=ORDER,
    num_threads=WARPGROUPS,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    interpret=interpret,
  )(*args)
  results = list(results)
  quantised_rows = [(results.pop(0), results.pop(0)[:, :M]) for _ in row_outputs]
  quantised_columns = [
    (results.pop(0), results.pop(0)[:, : V * K]) for V in column_outputs
  ]
  return quantised_rows, quantised_columns, results[0][:, :M] if sums else None


@dataclasses.dataclass(frozen=True)
class _Tile:
  """One thread block's tile, in shared memory."""

  sources: Sequence[Any]
  gate_ref: Any
  rows_ref: Any
  staging: Any
  slots: int
  k: int
  codes: Codes

  def load(self, inputs, loaded) -> None:
    """Each warpgroup brings its share of rows; both wait for all."""
    m, k, first = lax.axis_index("m"), lax.axis_index("k"), share()
    for (ref, offset), smem in zip(inputs, self.sources):
      at_rows = pl.ds(m * TILE + first, SHARE)
      at_columns = pl.ds((k + offset) * TILE, TILE)
      plgpu.copy_gmem_to_smem(
        ref.at[at_rows, at_columns], smem.at[pl.ds(first, SHARE)], loaded
      )
    plgpu.barrier_wait(loaded)

  def write(self, direction, out_refs, sums_ref, transposed: bool) -> None:
    """Computes, quantises and stores this warpgroup's share of one direction."""
    m, k = lax.axis_index("m"), lax.axis_index("k")
    across, along = (k, m) if transposed else (m, k)
    for (values_of, count), (q_ref, s_ref) in zip(direction.passes, out_refs):

      def step(t, _, values_of=values_of, count=count, q_ref=q_ref, s_ref=s_ref):
        start = share() + t * STEP
        tiles, gate = self._read(start, transposed)
        values, summed = values_of(tiles, gate)
        at = pl.ds(across * TILE + start, STEP)
        if sums_ref is not None:
          sums_ref[along, at] = jnp.sum(summed, axis=1)
        plgpu.wait_smem_to_gmem(self.slots - count, wait_read_only=True)
        for v, value in enumerate(values):
          q, s = _quantize(value, self.codes)
          slot = self.staging.at[
            lax.axis_index("warpgroup"), lax.rem(t * count + v, self.slots)
          ]
          slot[...] = q
          if transposed:
            at_v = pl.ds((v * self.k + across) * TILE + start, STEP)
            s_ref[along, at_v], at_q = s, (at_v, pl.ds(along * TILE, TILE))
          else:
            s_ref[v * self.k + along, at] = s
            at_q = at, pl.ds((v * self.k + along) * TILE, TILE)
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(slot, q_ref.at[at_q])

      lax.fori_loop(0, SHARE // STEP, step, None)

  def _read(self, start, transposed: bool):
    """FP32 tiles and gate of one step, with rows that are not valid set to zero."""
    first_row = lax.axis_index("m") * TILE
    dimension = 1 if transposed else 0  # that of rows
    values = [read(source, start, transposed) for source in self.sources]
    gate = None
    if self.gate_ref is not None:
      at_gate = pl.ds(first_row, TILE) if transposed else pl.ds(first_row + start, STEP)
      gate = plgpu.load(
        self.gate_ref.at[at_gate], layout=LAYOUT.reduce(1 - dimension), optimized=False
      )
      gate = lax.broadcast_in_dim(gate, (STEP, TILE), (dimension,))
    if self.rows_ref is not None:
      row = plgpu.broadcasted_iota(jnp.int32, (STEP, TILE), dimension, layout=LAYOUT)
      offset = first_row if transposed else first_row + start
      valid = row < self.rows_ref[0] - offset
      values = [jnp.where(valid, v, 0.0) for v in values]
      gate = None if gate is None else jnp.where(valid, gate, 0.0)
    return values, gate


def share():
  """The first of the tile's rows that this warpgroup writes."""
  return lax.axis_index("warpgroup") * SHARE


def read(smem, start, transposed: bool) -> jax.Array:
  """One step of a tile in shared memory, or of its transpose, in FP32."""
  at = pl.ds(start, STEP)
  view = smem.at[:, at].transpose((1, 0)) if transposed else smem.at[at]
  return plgpu.load(view, layout=LAYOUT).astype(jnp.float32)


def amax(x: jax.Array, axis: int, codes: Codes) -> jax.Array:
  """The largest magnitude along an axis, or NaN."""
  if codes.interpreted:  # XLA's maximum of floats can lose a NaN on CPU
    return reference.amax(x, axis)
  return jnp.max(jnp.abs(x), axis=axis)


def _quantize(x: jax.Array, codes: Codes) -> tuple[jax.Array, jax.Array]:
  """Codes and scales of the rows of x: what reference.quantize_rows does."""
  limit = float(jnp.finfo(codes.dtype).max)
  s = reference.scales(amax(x, 1, codes), limit, codes.power_of_two)
  # The conversion saturates, and s is below amax / 448 by no more than a rounding.
  return divide(x, s, codes).astype(codes.dtype), s


def divide(x: jax.Array, s: jax.Array, codes: Codes) -> jax.Array:
  """x / s rounded once, with an s for each row or for all; a zero keeps its sign."""

  def spread(a):
    wide = lax.broadcast_in_dim(a, x.shape, tuple(range(a.ndim)))
    return wide if codes.interpreted else plgpu.layout_cast(wide, LAYOUT)

  if codes.interpreted:
    return reference.divide(x, spread(s))
  reciprocal = 1.0 / s
  q = x * spread(reciprocal)
  if codes.power_of_two:
    return q
  excess = _fused_multiply_add(q, spread(s), -x)
  return _fused_multiply_add(excess, spread(-reciprocal), q)


def _fused_multiply_add(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
  """a * b + c rounded once; jnp has no such operation."""

  @plgpu.inline_mgpu(
    arg_types=(LAYOUT, LAYOUT, LAYOUT),
    return_type=plgpu.ShapeDtypeStruct(a.shape, jnp.float32, layout=LAYOUT),
  )
  def fma(_, a, b, c):
    return a._pointwise(mlir_math.fma, b, c)

  return fma(a, b, c)


def swizzled(shape: tuple[int, ...], dtype, swizzle: int):
  """Shared memory whose rows TMA spreads over the banks; `swizzle` in bytes."""
  columns = swizzle // jnp.dtype(dtype).itemsize
  transforms = (
    plgpu.TilingTransform((8, columns)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
  )
  return plgpu.SMEM(shape, dtype, transforms=transforms)
