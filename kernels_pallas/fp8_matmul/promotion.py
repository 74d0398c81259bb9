"""What one warpgroup of the FP8 kernel does to a tile: multiply 128, scale, add.

The tensor cores of Hopper keep about 14 bits while they accumulate FP8 products, so
128 of the contraction go into a fresh accumulator, which is scaled and added to sums in
FP32 registers (DeepSeek-V3 report, section 3.3.2).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.ring import PerThread, PerWarp, Step

BLOCK = 128  # of the contraction: a step, one scale, one promotion
WARPGROUP_ROWS = 64  # of a wgmma instruction
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)
_BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Ring:
  """Slots of shared memory and their barriers."""

  t: Any
  a: Any
  b: Any
  sa: Any
  barriers: PerThread | PerWarp
  sb: Any = None
  sum_bits: int | None = None  # that sums keep, None for all of FP32's
  whole_rounds: bool = False  # a tile's steps are a multiple of the slots

  def fillings(self, steps):
    """Of slots, by so many steps."""
    return steps if self.t.fetched == 1 else lax.div(steps, self.t.fetched)

  def step(self, first, n) -> Step:
    """The n-th filling of a tile whose first one has the number `first`."""
    return Step.of_number(first + n, self.t.slots, n * self.t.fetched)

  def each_round(self, first, start, stop, body, carry, unroll=True):
    """`body(steps, carry)` for the fillings of a tile from `start` to `stop`.

    One at a time, or in whole rounds all slots of the ring: then addresses are known up
    to a constant, and a warp has a quarter fewer instructions.
    """
    slots = self.t.slots
    if not (self.whole_rounds and unroll):

      def one(n, carry):
        return body([self.step(first, n)], carry)

      return lax.fori_loop(start, stop, one, carry)

    def whole(i, carry):
      odd, zero = lax.rem(lax.div(first, slots) + i, 2), self.barriers.zero()
      steps = []
      for slot in range(slots):
        k = i * slots + slot
        steps.append(Step(k, first + k, zero + slot, odd))
      return body(steps, carry)

    rounds = lax.div(start, slots), lax.div(stop, slots)
    return lax.fori_loop(*rounds, whole, carry)


@dataclasses.dataclass(frozen=True)
class Part:
  """64 rows of one tile, whose first filling is the ring's of number `first`."""

  ring: Ring
  work: Any
  mine: Any
  first: Any

  def scalars(self, k):
    """The scales of step k's columns, where they are scalars in global memory."""
    return tuple(self.work.column_scales(k)) if self.ring.sb is None else ()

  def row_scales(self, step, part=0):
    at = (step.slot, part) if self.ring.t.fetched > 1 else (step.slot,)
    return plgpu.load(self.ring.sa.at[*at, self.mine], layout=_BY_ROW)

  def start(self, acc, step, columns, part=0):
    """Queues 128 of the contraction on the tensor cores."""
    depth = (pl.ds(part * BLOCK, BLOCK),) if self.ring.t.fetched > 1 else ()
    a = self.ring.a.at[step.slot, self.mine, *depth]
    b = self.ring.b.at[step.slot, columns, *depth]
    plgpu.wgmma(acc, a, b.transpose((1, 0)))

  def promote(self, product, step, scales, sums, at, last):
    """The sums from column `at` on, with a fresh product added; the last one frees the
    slot."""
    (sa, scalars), ring = scales, self.ring
    if last and ring.sb is None:
      ring.barriers.release(step)
    width, new = sums[0].shape[1], list(sums)
    for i in range(at // width, (at + product.shape[1]) // width):
      start = i * width - at
      part, shape = product[:, start : start + width], sums[0].shape
      if ring.sb is None:
        part = part * lax.broadcast_in_dim(sa * scalars[i], shape, (0,))
      else:
        columns = ring.sb.at[step.slot, pl.ds(i * width, width)]
        sb = plgpu.load(columns, layout=_BY_COLUMN)
        part = part * lax.broadcast_in_dim(sb, shape, (1,))
        part = part * lax.broadcast_in_dim(sa, shape, (0,))
      new[i] = _add(sums[i], part, ring.sum_bits)
    if last and ring.sb is not None:
      ring.barriers.release(step)
    return tuple(new)

  def skip_all(self, done, steps):
    """Frees the slots of the steps from `done` on, which others multiply."""

    def skip(steps, _):
      for step in steps:
        self.ring.barriers.wait(step)
        self.ring.barriers.release(step)

    self.ring.each_round(self.first, done, steps, skip, None)

  def add_all(self, steps, sums):
    """All steps: `together` at a time as far as they go, then filling by filling."""
    ring, count, done = self.ring, self.ring.t.together, 0
    if count > 1:
      rounds, fillings = lax.div(steps, count), count // ring.t.fetched

      def ask(i):  # of the last step again after it
        last = jnp.maximum(steps - 1, 0)
        return [self.scalars(jnp.clip(i * count + j, 0, last)) for j in range(count)]

      def add(i, carry):
        sums, scalars = carry
        filled = [ring.step(self.first, i * fillings + j) for j in range(fillings)]
        return self._add_together(filled, scalars, sums), ask(i + 1)

      sums, _ = lax.fori_loop(0, rounds, add, (sums, ask(0)))
      done = ring.fillings(rounds * count)
    steps = ring.fillings(steps)
    return ring.each_round(self.first, done, steps, self._add_round, sums)

  def _add_round(self, steps, sums):
    """Fillings one after the other; their scalars are fetched before the first."""
    each = range(self.ring.t.fetched)
    scalars = [[self.scalars(step.k + j) for j in each] for step in steps]
    for step, scales in zip(steps, scalars):
      if len(each) > 1:
        sums = self._add_together([step], scales, sums)
      else:
        self.ring.barriers.wait(step)
        sums = self._add_step(step, scales[0], sums)
    return sums

  def _add_together(self, filled, scalars, sums):
    """All steps of some fillings, each into an accumulator of its own, in order."""
    ring, each = self.ring, range(self.ring.t.fetched)
    columns = sum(part.shape[1] for part in sums)
    parts = [(step, j) for step in filled for j in each]

    def multiply(*accumulators):
      for acc, (step, j) in zip(accumulators, parts):
        if j == 0:
          ring.barriers.wait(step)
        self.start(acc, step, pl.ds(0, columns), j)
      scales = [self.row_scales(*part) for part in parts]
      return scales, [acc[...] for acc in accumulators]

    fresh = [_accumulator(columns) for _ in parts]
    scales, products = pl.run_scoped(multiply, *fresh)
    for step in filled:  # all that its slot has was read
      ring.barriers.release(step)
    for (step, _), product, *scale in zip(parts, products, scales, scalars):
      sums = self.promote(product, step, scale, sums, 0, last=False)
    return sums

  def _add_step(self, step, scalars, sums):
    """One step by itself, whose slot is filled: multiply, wait, promote."""
    ring, columns = self.ring, sum(part.shape[1] for part in sums)
    fresh = ring.t.fresh or columns
    sa = None
    for at in range(0, columns, fresh):

      def multiply(acc, at=at, sa=sa):
        if sa is None and ring.whole_rounds:
          sa = self.row_scales(step)
        self.start(acc, step, pl.ds(at, fresh))
        sa = self.row_scales(step) if sa is None else sa  # beside the product
        return sa, acc[...]

      sa, product = pl.run_scoped(multiply, _accumulator(fresh))
      last = at + fresh == columns
      sums = self.promote(product, step, (sa, scalars), sums, at, last)
    return sums


def _add(sums: jax.Array, part: jax.Array, bits: int | None) -> jax.Array:
  """The sum; with `bits`, of terms cut to so many bits of the larger one's exponent.

  That is how the tensor cores align what they add, see `reference.multiply_14_bit`.
  """
  if bits is None:
    return sums + part
  largest = jnp.maximum(jnp.abs(sums), jnp.abs(part))
  exponent = lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000
  power = lax.bitcast_convert_type(exponent, jnp.float32)  # at or below the largest
  inverse = lax.bitcast_convert_type(0x7F000000 - exponent, jnp.float32)
  whole = 2.0 ** (bits - 1)
  units = [(x * inverse * whole).astype(jnp.int32) for x in (sums, part)]
  cut = (units[0] + units[1]).astype(jnp.float32) * (power * (1 / whole))
  return jnp.where(largest < jnp.inf, cut, sums + part)  # NaN stays NaN


def _accumulator(columns: int):
  return plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, columns))
