"""Tiles in shared memory, BF16 or FP8, to FP32 in registers, as rows or as columns.

`ldmatrix` transposes units of 16 bits, on Hopper none of 8, so what is FP8 is read by
bytes when transposed. The 32 bytes of a warp lie in different banks, or in one word,
and a thread has one address, to which constants are added. That costs a load for each
element instead of an eighth of one, and needs no barrier: widening a tile to 16 bits in
shared memory first would take about as many cycles of it, 32 KiB for each source, and
all warpgroups to wait for each other twice.

FP8 widens exactly, by way of FP16, subnormals and NaN included.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector

from kernels_pallas.quantize.gpu_arithmetic import LAYOUT, STEP, Codes
from kernels_pallas.quantize.gpu_ring import SWIZZLE, swizzled

_ROWS = 8  # of a unit that is swizzled, each of SWIZZLE bytes


def read(
  smem, start, first: int, columns: int, transposed: bool, codes: Codes
) -> jax.Array:
  """FP32 of 32 rows, from `start`, of a tile in shared memory, or of its transpose;
  `columns` columns from `first`."""
  rows, chunk = pl.ds(start, STEP), pl.ds(first, columns)
  if not transposed:
    x = plgpu.load(smem.at[rows, chunk], layout=LAYOUT)
  elif smem.dtype.itemsize > 1 or codes.interpreted:
    x = plgpu.load(smem.at[chunk, rows].transpose((1, 0)), layout=LAYOUT)
  else:
    x = _transposed_bytes(smem, start, first, columns)
  return x.astype(jnp.float32)


def _transposed_bytes(smem, start, first: int, columns: int) -> jax.Array:
  shape = STEP, columns
  layout = LAYOUT.to_mgpu()
  memory: Any = swizzled(smem.shape, smem.dtype)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(memory.transforms), plgpu.Layout.WG_SPLAT),
    return_type=plgpu.ShapeDtypeStruct(shape, smem.dtype, layout=LAYOUT),
  )
  def load(_, tile: ir.Value, start):
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    kind = ir.MemRefType(tile.type).element_type
    for at, indices in _places(layout, shape, first, start.registers.item()):
      pair = [memref.load(tile, index) for index in indices]
      registers[at] = vector.from_elements(ir.VectorType.get((2,), kind), pair)
    return type(start)(_registers=registers, _layout=layout, _is_signed=None)

  return load(smem, start)  # pyright: ignore[reportCallIssue]


def _places(layout, shape, first: int, start: ir.Value) -> Iterator[tuple]:
  """For each register of a thread its index, and the places of its pair of bytes in the
  tile [rows / 8, columns / SWIZZLE, 8, SWIZZLE], swizzled.

  A thread's first pair is that of row 8 warp + lane / 4 of the transpose, which is the
  column in the tile, and of columns 2 (lane % 4) and the next, which are the rows. The
  others follow 8 rows of the tile after each other. Swizzling by 64 bytes exchanges
  pieces of 16 bytes, whose number is XORed with that of the pair of rows in the unit.
  """

  def constant(value: int) -> ir.Value:
    return arith.constant(ir.IndexType.get(), value)

  column, row = next(iter(layout.thread_idxs(shape)))
  start = arith.index_cast(ir.IndexType.get(), start)
  column = arith.addi(column, arith.remui(start, constant(SWIZZLE)))
  column = arith.xori(column, arith.muli(row, constant(16 // 2)))
  unit = arith.divui(start, constant(SWIZZLE))
  rows = [row, arith.addi(row, constant(1))]
  for at in np.ndindex(layout.registers_shape(shape)):
    step = constant(first // _ROWS + at[1])
    yield at, [[step, unit, row, column] for row in rows]
