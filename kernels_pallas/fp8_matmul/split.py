"""Thread blocks that split a tile's contraction, for products of few rows.

A thread block fetches all rows of its tile besides its part of the weights. Where tiles
must be narrow to give every multiprocessor some, all of them together fetch the rows so
often from L2 that this takes longer than the weights do from memory. So the blocks of a
cluster take wider tiles and a part of the contraction each, and in the end a part of
the columns: each sends the others its sums of their columns, in FP32, from registers
into their shared memory.

Sending them takes as long as they have bytes, some 10 a cycle and multiprocessor on an
H100. So the last steps may be left out of the split: each block multiplies all of them
for its own columns, while the sums of the others' travel, and fetches more rows for it.

A thread's sums are those of the same rows and columns in each block, so they need no
order but the threads'. A thread block has one tile, so nothing is received twice.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector

from kernels_pallas.hopper import computed, int32, int32_constant

_ROWS = 64  # of a warpgroup
_THREADS = 128  # of a warpgroup
_GROUP = 8  # neighbouring columns, of which a thread has two in two rows:
_VALUES = 4
_LAYOUT = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class Split:
  """What the blocks of a cluster exchange.

  Attributes:
    parts: blocks of a cluster.
    columns: of a tile.
    warpgroups: of a block that multiply.
    received: FP32, in shared memory, from the other blocks.
    arrived: a barrier's words there.
    last: steps at a tile's end that each block multiplies for its own columns only.
  """

  parts: int
  columns: int
  warpgroups: int
  received: Any
  arrived: Any
  last: int = 0

  @staticmethod
  def scratch(parts: int, columns: int, warpgroups: int) -> dict[str, Any]:
    size = warpgroups * (parts - 1) * _ROWS * columns // parts
    return {
      "received": plgpu.SMEM((size,), jnp.float32),
      "arrived": plgpu.SMEM((2,), jnp.int32),
    }

  @property
  def own_columns(self) -> int:
    return self.columns // self.parts

  def start(self):
    """Called once by all threads, before the others."""
    bytes_ = 4 * self.received.shape[0]

    def initialise(_, words):
      first, address = mgpu.single_thread_predicate(), mgpu_utils.memref_ptr(words)
      for ptx in (
        "mbarrier.init.shared::cta.b64 [$0], 1;",
        f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {bytes_};",
      ):
        mgpu_utils.inline_ptx(ptx, address, predicate=first, has_side_effects=True)
      _emit("fence.mbarrier_init.release.cluster;")
      _emit("barrier.cluster.arrive.relaxed.aligned;")

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(initialise)(self.arrived)

  def meet(self):
    """Called once by all threads: waits until all blocks have started."""
    plgpu.inline_mgpu()(lambda _: _emit("barrier.cluster.wait.aligned;"))()

  def share(self, work):
    """A tile of which this block takes its part of the steps, then its own columns."""
    rank, start = _rank(), work.steps - self.last
    first = lax.div(start * rank, self.parts)

    def steps_from(first, count, **others):
      return dataclasses.replace(
        work,
        steps=count,
        row_scales=lambda k: work.row_scales(first + k),
        column_scales=lambda k: work.column_scales(first + k),
        **others,
      )

    def of_own(k):
      a, b = work.operands(start + k)
      return a, b.rows(self.own_columns, rank * self.own_columns)

    own = steps_from(start, jnp.int32(self.last), operands=of_own)
    return steps_from(
      first,
      lax.div(start * (rank + 1), self.parts) - first,
      operands=lambda k: work.operands(first + k),
      last=own if self.last else None,
    )

  def own(self, out):
    """This block's columns of a tile of the output."""
    return out.at[:, pl.ds(_rank() * self.own_columns, self.own_columns)]

  def send(self, sums: tuple[jax.Array, ...], warpgroup) -> jax.Array:
    """To each other block its columns; this block's own, [64, columns / parts].

    `sums`: this block's of all columns, [64, columns] in pieces.
    """
    own = plgpu.ShapeDtypeStruct(
      (_ROWS, self.own_columns), jnp.dtype(jnp.float32), _LAYOUT
    )

    def send(_, received, arrived, rank, *sums):
      groups = [group for x in sums for group in _by_group(x)]
      count, rank = len(groups) // self.parts, rank.registers.item()
      of_block = [groups[i : i + count] for i in range(0, len(groups), count)]
      self._send(of_block, rank, received, arrived)
      return _of_groups(_pick(of_block, rank), sums[0], own.shape)

    types = plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT
    types = *types, *[_LAYOUT] * len(sums)
    run: Any = plgpu.inline_mgpu(arg_types=types, return_type=own)(send)
    return run(self._room(warpgroup), self.arrived, _rank(), *sums)

  def receive(self, sums: jax.Array, warpgroup) -> jax.Array:
    """All blocks' sums of this block's columns; `sums`: this one's."""

    def receive(_, received, arrived, sums):
      total = _by_group(sums)
      self._receive(total, received, arrived)
      return _of_groups(total, sums, sums.shape)

    own = plgpu.ShapeDtypeStruct(sums.shape, sums.dtype, _LAYOUT)
    types = plgpu.RefType(), plgpu.RefType(), _LAYOUT
    run: Any = plgpu.inline_mgpu(arg_types=types, return_type=own)(receive)
    return run(self._room(warpgroup), self.arrived, sums)

  def _room(self, warpgroup):
    """Of what a warpgroup receives."""
    size = self.received.shape[0] // self.warpgroups
    return self.received.at[pl.ds(warpgroup * size, size)]

  def _send(self, of_block, rank, received, arrived):
    """Each other block its groups, and its barrier their bytes."""
    start, barrier = mgpu_utils.memref_ptr(received), mgpu_utils.memref_ptr(arrived)
    for block, groups in enumerate(of_block):
      # A block has room for those before it and after it, not for itself.
      after = arith.cmpi(arith.CmpIPredicate.ugt, rank, int32_constant(block))
      number = arith.subi(rank, arith.extui(int32(), after))
      other = arith.cmpi(arith.CmpIPredicate.ne, rank, int32_constant(block))
      room = int32_constant(len(groups) * _THREADS * _VALUES)
      first = arith.addi(arith.muli(number, room), _first_value())
      theirs = mgpu_utils.get_cluster_ptr(start, int32_constant(block), generic=False)
      signal = mgpu_utils.get_cluster_ptr(barrier, int32_constant(block), generic=False)
      theirs = mgpu_utils.getelementptr(theirs, [first], _f32())
      for i, group in enumerate(groups):
        mgpu_utils.inline_ptx(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
          "[$0], {$1, $2, $3, $4}, [$5];",
          *(_group_at(theirs, i), *group, signal),
          predicate=other,
          has_side_effects=True,
        )

  def _receive(self, total, received, arrived):
    """Adds what the other blocks have sent, in their order."""
    barrier = mgpu_utils.memref_ptr(arrived)
    phase = mgpu.BarrierRef(barrier, int32_constant(0), arrived, num_barriers=1)
    phase.wait_parity(arith.constant(ir.IntegerType.get_signless(1), 0))
    start = mgpu_utils.memref_ptr(received)
    start = mgpu_utils.getelementptr(start, [_first_value()], _f32())
    for block in range(self.parts - 1):
      for i, group in enumerate(total):
        more = mgpu_utils.inline_ptx(
          "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];",
          _group_at(start, block * len(total) + i),
          result_types=[_f32()] * _VALUES,
          has_side_effects=True,
        )
        total[i] = [arith.addf(x, y) for x, y in zip(group, more)]


def _rank():
  """Of this thread block in its cluster; by its index in the grid it is a division."""
  ptx = "mov.u32 $0, %cluster_ctarank;"
  return computed(lambda: mgpu_utils.inline_ptx(ptx, result_types=int32()))


def _pick(of_block, rank) -> list[list[ir.Value]]:
  """The groups of the block of this rank, known only when the kernel runs."""
  picked = of_block[0]
  for block, groups in enumerate(of_block[1:], 1):
    here = arith.cmpi(arith.CmpIPredicate.eq, rank, int32_constant(block))
    picked = [
      [arith.select(here, x, y) for x, y in zip(group, old)]
      for group, old in zip(groups, picked)
    ]
  return picked


def _first_value() -> ir.Value:
  """Where a thread's values of the first group begin: threads are side by side."""
  thread = arith.remui(mgpu_utils.thread_idx(), int32_constant(_THREADS))
  return arith.muli(thread, int32_constant(_VALUES))


def _group_at(start: ir.Value, number: int) -> ir.Value:
  return mgpu_utils.getelementptr(start, [number * _THREADS * _VALUES], _f32())


def _by_group(x) -> list[list[ir.Value]]:
  """A thread's four values of each eight columns, of an array [64, N]."""
  by_group = x.registers.reshape(x.shape[1] // _GROUP, -1)
  return [
    [
      vector.extract(register, dynamic_position=[], static_position=[i])
      for register in registers
      for i in range(2)
    ]
    for registers in by_group
  ]


def _of_groups(groups: list[list[ir.Value]], like, shape):
  """The array of such values."""
  layout = like.layout
  pair = ir.VectorType.get((2,), _f32())
  registers = np.empty(layout.registers_shape(shape), dtype=object)
  flat = [
    vector.from_elements(pair, group[i : i + 2]) for group in groups for i in (0, 2)
  ]
  registers.flat[:] = flat
  return type(like)(_registers=registers, _layout=layout, _is_signed=None)


def _emit(ptx: str):
  mgpu_utils.inline_ptx(ptx, has_side_effects=True, convergent=True)


def _f32() -> ir.Type:
  return ir.F32Type.get()
