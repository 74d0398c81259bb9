"""Barriers of a ring of slots in shared memory: a step's slot is filled, then free.

The matrix products on Hopper share them, FP8 and BF16. Pallas's own barriers count
every thread: a copy is an arrival of each thread of the warpgroup that issues it, a
slot that was read one of each thread that has read it: with three copies and three
warpgroups 768 for 128 of the contraction. They are `PerThread`. `PerWarp` keeps
barriers of its own in shared memory, where one thread arrives for all copies of a step
and one for each warp that has read. Only those reach the other thread block of a
cluster without a fence of all memory.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

from kernels_pallas.hopper import computed, int32, int32_constant, transforms

_WARPS = 4  # of a warpgroup
_WORDS = 2  # of 32 bits, of a barrier
_PAIR = mgpu_utils.gpu.Dimension.x  # pyright: ignore[reportPrivateImportUsage]
_SCALAR = plgpu.Layout.WG_SPLAT


@dataclasses.dataclass(frozen=True)
class View:
  """A window of an array in global memory: `pl.ds` and integers, one a dimension."""

  ref: Any
  at: tuple[Any, ...]
  shared: bool = False  # the same for all blocks of a cluster

  @property
  def count(self) -> int:
    """Its rows, the dimension before the last."""
    return int(self.at[-2].size)

  def rows(self, count: int, start: Any = 0) -> "View":
    """So many of them from `start` on."""
    *outer, rows, last = self.at
    at = (*outer, pl.ds(rows.start + start, count), last)
    return dataclasses.replace(self, at=at)


@dataclasses.dataclass(frozen=True)
class Step:
  """What a slot of the ring is filled with: steps of a tile from k on.

  `number` counts fillings since the kernel's start; `odd` is 1 in every second round
  through the slots.
  """

  k: Any
  number: Any
  slot: Any
  odd: Any

  @staticmethod
  def of_number(number, slots: int, k) -> "Step":
    """That of the filling of this number."""
    rounds = lax.div(number, slots)
    return Step(k, number, number - rounds * slots, lax.rem(rounds, 2))


@dataclasses.dataclass(frozen=True)
class PerThread:
  """Pallas's barriers; copies of a step arrive one by one."""

  slots: int
  filled: Any
  free: Any

  @staticmethod
  def scratch(slots: int, warpgroups: int, copies: int) -> dict[str, Any]:
    """`copies` of each step."""
    return {
      "filled": plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
      "free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=slots),
    }

  def start(self):
    """Called once by all threads, before the others."""

  def stop(self):
    """Called once by all threads, after the others."""

  def copies_here(self):
    """Whether this warp of the copying warpgroup is the one that copies."""
    return True

  def zero(self):
    """0; the slots of a round are added to it."""
    return 0

  def copy(self, step: Step, copies: Sequence[tuple[View, Any]]):
    """Fills the slot of `step` once it is free; of the copying warpgroup."""

    @pl.when(step.number >= self.slots)
    def wait():
      plgpu.barrier_wait(self.free.at[step.slot])

    for view, smem in copies:
      plgpu.copy_gmem_to_smem(view.ref.at[view.at], smem, self.filled.at[step.slot])

  def finish(self, copied):
    """Called by the copying warpgroup after so many steps."""

    def drain(step, _):  # the last slots: every arrival is waited for once
      plgpu.barrier_wait(self.free.at[lax.rem(step, self.slots)])

    lax.fori_loop(jnp.maximum(copied - self.slots, 0), copied, drain, None)

  def wait(self, step: Step):
    """Until the slot of `step` is filled; of each warpgroup that multiplies."""
    plgpu.barrier_wait(self.filled.at[step.slot])

  def release(self, step: Step):
    """Says that this warpgroup has read the slot of `step`."""
    plgpu.barrier_arrive(self.free.at[step.slot])


@dataclasses.dataclass(frozen=True)
class PerWarp:
  """Barriers in shared memory: the slots' `filled`, then their `free`."""

  slots: int
  warpgroups: int
  cluster: int
  swizzle: int  # of the operands, bytes
  words: Any

  @staticmethod
  def scratch(slots: int) -> dict[str, Any]:
    return {"words": plgpu.SMEM((2 * slots * _WORDS,), jnp.int32)}

  def start(self):
    readers = self.warpgroups * _WARPS * self.cluster

    def initialise(words):
      start = mgpu_utils.memref_ptr(words)
      # In a branch: each with a predicate of its own takes several times as long.
      with mgpu_utils.when(mgpu.single_thread_predicate()):
        for i, count in enumerate([1] * self.slots + [readers] * self.slots):
          at = f"[$0+{4 * _WORDS * i}]"
          _emit(f"mbarrier.init.shared::cta.b64 {at}, {count};", start)
      mgpu_utils.inline_ptx(
        "fence.mbarrier_init.release.cluster;", has_side_effects=True, convergent=True
      )
      self._meet()

    _inline(initialise, self.words)

  def stop(self):
    if self.cluster > 1:  # the other block may still write here
      _inline(lambda words: self._meet(), self.words)

  def _meet(self):
    """All threads of the block or cluster wait for each other."""
    wait = ["barrier.sync 0;"]
    if self.cluster > 1:
      wait = ["barrier.cluster.arrive.aligned;", "barrier.cluster.wait.aligned;"]
    for ptx in wait:
      mgpu_utils.inline_ptx(ptx, has_side_effects=True, convergent=True)

  def copies_here(self):
    def warp():
      return arith.remui(mgpu_utils.warp_idx(), int32_constant(_WARPS))

    return computed(warp) == 0

  def zero(self):
    """0, which the compiler learns in each round anew.

    So it keeps no address of a slot in registers over the rounds: they would not do.
    """
    zero = "mov.b32 $0, 0;"
    return computed(
      lambda: mgpu_utils.inline_ptx(zero, result_types=int32(), has_side_effects=True)
    )

  def copy(self, step: Step, copies: Sequence[tuple[View, Any]]):
    bytes_ = sum(math.prod(smem.shape) * smem.dtype.itemsize for _, smem in copies)
    layouts = [self._layout(smem) for _, smem in copies]

    def issue(ctx, words, slot, odd, starts, sources, targets):
      slot = _value(slot)
      filled = _barrier(words, slot)
      # Of a slot that was never filled the phase before the first, odd, is over.
      free = _barrier(words, arith.addi(slot, int32_constant(self.slots)))
      _wait(free, arith.xori(_value(odd), int32_constant(1)))
      leader = mgpu.single_thread_predicate(mgpu.ThreadSubset.WARP)
      filled.arrive_expect_tx(bytes_, predicate=leader)
      for i, (view, _) in enumerate(copies):
        ctx.async_copy(
          src_ref=sources[i],
          dst_ref=targets[i],
          gmem_slice=tuple(map(_slice, starts[i], view.at)),
          gmem_transform=tuple(mgpu.TileTransform(x.tiling) for x in layouts[i][:1]),
          swizzle=self.swizzle if layouts[i] else None,
          collective=_PAIR if view.shared and self.cluster > 1 else None,
          barrier=filled,
          arrive=False,
          predicate=leader,
        )

    starts = [[_start(at) for at in view.at] for view, _ in copies]
    types = (
      *(plgpu.RefType(), _SCALAR, _SCALAR),
      jax.tree.map(lambda _: _SCALAR, starts),
      [plgpu.RefType() for _ in copies],
      [plgpu.RefType(layout) for layout in layouts],
    )
    run: Any = plgpu.inline_mgpu(arg_types=types)(issue)
    sources, targets = [view.ref for view, _ in copies], [smem for _, smem in copies]
    run(self.words, jnp.int32(step.slot), step.odd, starts, sources, targets)

  def finish(self, copied):
    """Nothing: a barrier may be left with arrivals that nobody waits for."""

  def wait(self, step: Step):
    def wait(words, slot, odd):
      _wait(_barrier(words, slot), odd)

    _inline(wait, self.words, step.slot, step.odd)

  def release(self, step: Step):
    def arrive(words, free):
      address, space = _barrier(words, free).get_ptr(), "cta"
      mgpu_utils.warp_barrier()  # all of the warp's threads have read
      warp = int32_constant(mgpu_utils.WARP_SIZE)
      lane = arith.remui(mgpu_utils.thread_idx(), warp)
      if self.cluster > 1:  # a thread for each block of the cluster
        address = mgpu_utils.get_cluster_ptr(address, lane, generic=False)
        space = "cluster"
      leads = arith.cmpi(arith.CmpIPredicate.ult, lane, int32_constant(self.cluster))
      # What was read is read, nothing was written. Release to the cluster would be a
      # fence of the whole GPU's memory.
      ptx = f"mbarrier.arrive.release.cta.shared::{space}.b64 _, [$0];"
      _emit(ptx, address, leads)

    _inline(arrive, self.words, step.slot + self.slots)

  def _layout(self, smem) -> tuple[Any, ...]:
    """Of a slot: operands are swizzled, scales are not."""
    return () if smem.dtype == jnp.float32 else transforms(smem.dtype, self.swizzle)


def barriers(
  per_warp: bool, slots: int, warpgroups: int, copies: int, cluster: int, swizzle: int
) -> tuple[Callable[..., PerThread | PerWarp], dict[str, Any]]:
  """What makes them of their scratch memory, and that; `copies` of each step."""
  if per_warp:
    make = functools.partial(PerWarp, slots, warpgroups, cluster, swizzle)
    return make, PerWarp.scratch(slots)
  make = functools.partial(PerThread, slots)
  return make, PerThread.scratch(slots, warpgroups, copies)


def of_block(place, cluster: int):
  """Of the tiles that a cluster has side by side, this thread block's."""
  return place if cluster == 1 else place * cluster + lax.axis_index("block")


def _inline(emit: Callable[..., None], words, *scalars):
  """`emit(words, *scalars)` writes instructions, with the kernel's own values."""

  def inline(_, words, *scalars):
    emit(words, *map(_value, scalars))

  types = (plgpu.RefType(), *(_SCALAR for _ in scalars))
  run: Any = plgpu.inline_mgpu(arg_types=types)(inline)
  run(words, *map(jnp.int32, scalars))


def _emit(ptx: str, address, predicate=None):
  mgpu_utils.inline_ptx(ptx, address, predicate=predicate, has_side_effects=True)


def _slice(start, at):
  """An index of `async_copy`: of one element, or of a window."""
  first = arith.index_cast(ir.IndexType.get(), _value(start))
  return mgpu.ds(first, int(at.size)) if isinstance(at, pl.Slice) else first


def _start(at):
  return jnp.int32(at.start if isinstance(at, pl.Slice) else at)


def _barrier(words, index) -> mgpu.BarrierRef:
  """The barrier of that index; phases are counted by the caller."""
  address, phases = mgpu_utils.memref_ptr(words), words  # not read
  return mgpu.BarrierRef(address, index, phases, num_barriers=1)


def _wait(barrier, odd):
  """Until the barrier's phase is over, an even or an odd one."""
  barrier.wait_parity(arith.trunci(ir.IntegerType.get_signless(1), odd))


def _value(scalar):
  return scalar.registers.item()
