"""1x128 and 128x1 tiles on Hopper: the kernel behind every tile quantiser.

A 128x128 tile of each source lies in shared memory (`gpu_ring`). Each of the four
warpgroups of a team takes 32 of its rows and, where columns are wanted too, 32 rows of
its transpose, transposed as they are read (`gpu_read`): in either direction a tile of
128 values is a row, and four lanes hold it. So one piece of code serves both, and what
is computed from the sources (SwiGLU) is computed twice rather than transposed in FP32.
Ragged edges are padded with zeros by TMA on the way in and dropped on the way out.

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

from kernels_pallas.quantize import gpu_arithmetic as arithmetic
from kernels_pallas.quantize.gpu_arithmetic import LAYOUT, STEP, Codes
from kernels_pallas.quantize.gpu_read import read
from kernels_pallas.quantize.gpu_ring import (
  WARPGROUPS,
  Source,
  for_each_tile,
  swizzled,
  warpgroup,
)
from kernels_pallas.quantize.reference import TILE, Quantized

_CHUNK = 64  # columns computed at once, to need few registers
_SLOTS = 2  # of a warpgroup's codes that may be on their way to memory


@dataclasses.dataclass(frozen=True)
class Output:
  """What to quantise, into one array or several.

  `values(tiles, gate)` makes V values in FP32 from the sources' values and the gate's,
  and with them what to sum along rows, or None. `arrays`: how many of them lie side by
  side (or, of the transpose, below each other) in each array. `power_of_two`: these
  scales are powers of two even where those of other outputs are not.
  """

  values: Callable[..., tuple[list[jax.Array], jax.Array | None]]
  arrays: tuple[int, ...] = (1,)
  power_of_two: bool = False

  @property
  def V(self) -> int:
    return sum(self.arrays)


@dataclasses.dataclass(frozen=True)
class Matrix:
  """What a kernel reads: BF16, or FP8 codes with their 1x128 scales [k, M]."""

  array: jax.Array
  scales: jax.Array | None = None
  first: int = 0  # of the tile columns that are read


def quantize_tiles(
  sources: Sequence[Matrix],
  gate_M: jax.Array | None,
  rows: jax.Array | int | None,
  by_rows: Sequence[Output],
  by_columns: Sequence[Output],
  *,
  columns: int,
  sums: bool = False,
  power_of_two: bool,
  dtype: jax.typing.DTypeLike,
  num_sms: int | None = None,
  interpret=None,
) -> tuple[list[Quantized], list[Quantized], jax.Array | None]:
  """Runs the kernel.

  Args:
    sources: matrices with M rows.
    gate_M: FP32 factor of each row, or None.
    rows: number of valid rows, or None.
    by_rows, by_columns: what to write in either direction.
    columns: K, of a source and of each value.
    sums: whether the sums of by_rows[0] are wanted.
    num_sms: multiprocessors to use, None for all.

  Returns:
    Quantised arrays along rows (K columns for each value), along columns (K rows for
    each), and for each tile column the sums over its 128 columns, [k, M].
  """
  M, K = sources[0].array.shape[0], columns
  m, k = pl.cdiv(M, TILE), pl.cdiv(K, TILE)
  outputs = *by_rows, *by_columns
  per_tile = sum(output.V for output in outputs)
  along_rows = [count for output in by_rows for count in output.arrays]
  along_columns = [count for output in by_columns for count in output.arrays]
  codes = Codes(jnp.dtype(dtype), power_of_two, interpreted=interpret is not None)
  out = []  # scales are written for whole tiles
  for count in along_rows:
    out.append(jax.ShapeDtypeStruct((M, count * K), dtype))
    out.append(jax.ShapeDtypeStruct((count * k, m * TILE), jnp.float32))
  for count in along_columns:
    out.append(jax.ShapeDtypeStruct((count * K, M), dtype))
    out.append(jax.ShapeDtypeStruct((m, count * k * TILE), jnp.float32))
  out += [jax.ShapeDtypeStruct((k, m * TILE), jnp.float32)] if sums else []

  def compute(place, t, tiles, scalar_refs, out_refs, scratch):
    i, j = place
    [rows_ref] = scalar_refs or [None]
    refs = list(tiles)
    matrices = [refs.pop(0) for _ in sources]
    scales = [None if x.scales is None else refs.pop(0) for x in sources]
    [gate_ref] = refs or [None]
    staging = _Staging(scratch[0], t * per_tile)
    left = list(out_refs)
    for n, output in enumerate(outputs):
      refs = [(left.pop(0), left.pop(0)) for _ in output.arrays]
      sums_ref = out_refs[-1] if sums and n == 0 else None
      power = power_of_two or output.power_of_two
      of_output = dataclasses.replace(codes, power_of_two=power)
      tile = _Tile(i, j, matrices, scales, gate_ref, rows_ref, k, of_output)
      tile.write(output, refs, sums_ref, staging, transposed=n >= len(by_rows))
      staging = dataclasses.replace(staging, used=staging.used + output.V)

  results = for_each_tile(
    compute,
    (m, k),
    _sources(sources, gate_M),
    [] if rows is None else [jnp.asarray(rows, jnp.int32).reshape(1)],
    out,
    lambda teams: [swizzled((teams, WARPGROUPS, _SLOTS, STEP, TILE), dtype)],
    WARPGROUPS * _SLOTS * STEP * TILE,
    num_sms,
    interpret,
  )
  pairs = list(zip(results[::2], results[1::2]))
  edge, end = len(along_rows), len(along_rows + along_columns)
  quantised_rows = [(q, s[:, :M]) for q, s in pairs[:edge]]
  quantised_columns = [(q, s[:, : q.shape[0]]) for q, s in pairs[edge:end]]
  return quantised_rows, quantised_columns, results[-1][:, :M] if sums else None


def _sources(matrices: Sequence[Matrix], gate_M) -> list[Source]:
  """Tiles of all matrices, then the scales of those that have some, then the gate."""

  def tile_at(offset):
    return lambda i, j: (pl.ds(i * TILE, TILE), pl.ds((j + offset) * TILE, TILE))

  def scales_at(offset):
    return lambda i, j: (j + offset, pl.ds(i * TILE, TILE))

  sources = [Source(x.array, (TILE, TILE), tile_at(x.first)) for x in matrices]
  for x in matrices:
    if x.scales is not None:
      sources.append(Source(_to_tiles(x.scales), (TILE,), scales_at(x.first)))
  if gate_M is not None:
    gate_M = _to_tiles(gate_M.astype(jnp.float32))
    sources.append(Source(gate_M, (TILE,), lambda i, j: (pl.ds(i * TILE, TILE),)))
  return sources


def _to_tiles(x: jax.Array) -> jax.Array:
  """Zeros after the last of the rows M, which are x's last dimension."""
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % TILE)])


@dataclasses.dataclass(frozen=True)
class _Staging:
  """Slots in shared memory from which TMA stores codes; `used` counts them."""

  ref: Any
  used: Any

  def slot(self, index: int):
    """The next slot, once what it held before has been read."""
    plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
    return self.ref.at[warpgroup(), lax.rem(self.used + index, _SLOTS)]


@dataclasses.dataclass(frozen=True)
class _Tile:
  """One tile, in shared memory, as one warpgroup sees it."""

  m: Any
  k: Any
  matrices: Sequence[Any]
  scales: Sequence[Any]  # of each matrix's rows, or None
  gate: Any  # of each row, or None
  rows_ref: Any
  k_tiles: int
  codes: Codes

  def write(self, output: Output, refs, sums_ref, staging, transposed: bool) -> None:
    """Computes, quantises and stores this warpgroup's share of one output."""
    start = warpgroup() * STEP
    across, along = (self.k, self.m) if transposed else (self.m, self.k)
    of_chunk = [
      output.values(*self._read(start, first, transposed))
      for first in range(0, TILE, _CHUNK)
    ]
    if sums_ref is not None:
      at = pl.ds(across * TILE + start, STEP)
      terms = [term for _, term in of_chunk if term is not None]
      sums_ref[along, at] = jnp.sum(_accumulate(jnp.add, terms), axis=1)
    places = [
      (pair, n) for pair, count in zip(refs, output.arrays) for n in range(count)
    ]
    for v, ((q_ref, s_ref), n) in enumerate(places):
      chunks = [values[v] for values, _ in of_chunk]
      # Of values side by side, the n-th begins n K columns or rows further.
      row, column = (n * self.k_tiles, 0) if transposed else (0, n * self.k_tiles)
      at = pl.ds((row + across) * TILE + start, STEP)
      slot = staging.slot(v)
      s_ref[column + along, at] = self._quantize(chunks, slot)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(slot, q_ref.at[at, pl.ds((column + along) * TILE, TILE)])

  def _quantize(self, chunks: list[jax.Array], slot) -> jax.Array:
    """Writes the codes of 32 rows, in chunks of columns, and gives their scales."""
    largest = _accumulate(jnp.maximum, [jnp.abs(x) for x in chunks])
    s = arithmetic.scales(arithmetic.amax(largest, 1, self.codes), self.codes)
    r = arithmetic.reciprocals(s, self.codes)
    for c, x in enumerate(chunks):
      # The conversion saturates; s is below amax / 448 by no more than a rounding.
      q = arithmetic.divide(x, s, r, self.codes).astype(self.codes.dtype)
      slot[:, c * _CHUNK : (c + 1) * _CHUNK] = q
    return s

  def _read(self, start, first: int, transposed: bool):
    """FP32 values and gate of 32 rows and a chunk of columns of the tile, or of its
    transpose, with rows that are not valid set to zero."""
    shape, dimension = (STEP, _CHUNK), 1 if transposed else 0  # that of M
    row_of_tile, count = (first, _CHUNK) if transposed else (start, STEP)
    at, layout = pl.ds(row_of_tile, count), LAYOUT.reduce(1 - dimension)

    def spread(of_rows):
      return lax.broadcast_in_dim(of_rows, shape, (dimension,))

    values = []
    for smem, scales in zip(self.matrices, self.scales):
      value = read(smem, start, first, _CHUNK, transposed, self.codes)
      if scales is not None:
        value *= spread(plgpu.load(scales.at[at], layout=layout))
      values.append(value)
    gate = None
    if self.gate is not None:
      gate = spread(plgpu.load(self.gate.at[at], layout=layout))
    if self.rows_ref is not None:
      row = plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=LAYOUT)
      valid = row < self.rows_ref[0] - self.m * TILE - row_of_tile
      values = [jnp.where(valid, v, 0.0) for v in values]
      gate = None if gate is None else jnp.where(valid, gate, 0.0)
    return values, gate


def _accumulate(op: Callable, arrays: Sequence[jax.Array]) -> jax.Array:
  result = arrays[0]
  for array in arrays[1:]:
    result = op(result, array)
  return result
