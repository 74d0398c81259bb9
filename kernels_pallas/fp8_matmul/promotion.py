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

WARPGROUP_ROWS = 64  # of a wgmma instruction
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)
_BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Ring:
  """Slots of shared memory, with a barrier each for "filled" and "free again"."""

  t: Any
  a: Any
  b: Any
  sa: Any
  filled: Any
  free: Any
  sb: Any = None
  sum_bits: int | None = None  # that sums keep, None for all of FP32's


@dataclasses.dataclass(frozen=True)
class Part:
  """64 rows of one tile, whose step 0 is the ring's step `first`."""

  ring: Ring
  work: Any
  mine: Any
  first: Any

  def slot(self, k):
    return lax.rem(self.first + k, self.ring.t.stages)

  def wait(self, k):
    """Waits for step k; the scales of its columns, where they are scalars."""
    scalars = () if self.ring.sb is not None else tuple(self.work.column_scales(k))
    plgpu.barrier_wait(self.ring.filled.at[self.slot(k)])
    return scalars

  def row_scales(self, k):
    return plgpu.load(self.ring.sa.at[self.slot(k), self.mine], layout=_BY_ROW)

  def start(self, acc, k, columns):
    """Queues 128 of the contraction on the tensor cores."""
    a = self.ring.a.at[self.slot(k), self.mine]
    b = self.ring.b.at[self.slot(k), columns]
    plgpu.wgmma(acc, a, b.transpose((1, 0)))

  def promote(self, product, k, scales, sums, at, last):
    """The sums from column `at` on, with a fresh product added; frees the slot."""
    (sa, scalars), ring, slot = scales, self.ring, self.slot(k)
    if last and ring.sb is None:
      self.free(k)
    width, new = sums[0].shape[1], list(sums)
    for i in range(at // width, (at + product.shape[1]) // width):
      start = i * width - at
      part, shape = product[:, start : start + width], sums[0].shape
      if ring.sb is None:
        part = part * lax.broadcast_in_dim(sa * scalars[i], shape, (0,))
      else:
        sb = plgpu.load(ring.sb.at[slot, pl.ds(i * width, width)], layout=_BY_COLUMN)
        part = part * lax.broadcast_in_dim(sb, shape, (1,))
        part = part * lax.broadcast_in_dim(sa, shape, (0,))
      new[i] = _add(sums[i], part, ring.sum_bits)
    if last and ring.sb is not None:
      self.free(k)
    return tuple(new)

  def free(self, k):
    """Reports that this warpgroup has read step k's slot."""
    plgpu.barrier_arrive(self.ring.free.at[self.slot(k)])

  def skip_step(self, k, _):
    """Frees the slot of a step that others multiply."""
    plgpu.barrier_wait(self.ring.filled.at[self.slot(k)])
    self.free(k)

  def add_all(self, steps, sums):
    """All steps: `together` at a time as far as they go, then one by one."""
    count, done = self.ring.t.together, 0
    if count > 1:
      rounds = lax.div(steps, count)
      sums = lax.fori_loop(0, rounds, self._add_steps, sums)
      done = rounds * count
    return lax.fori_loop(done, steps, self.add_step, sums)

  def _add_steps(self, i, sums):
    """`together` steps, each into an accumulator of its own, promoted in order."""
    columns, count = self.ring.t.columns, self.ring.t.together
    steps = [i * count + j for j in range(count)]
    scalars = [self.wait(k) for k in steps]

    def multiply(*accumulators):
      for acc, k in zip(accumulators, steps):
        self.start(acc, k, pl.ds(0, columns))
      return [self.row_scales(k) for k in steps], [acc[...] for acc in accumulators]

    scales, products = pl.run_scoped(multiply, *[_accumulator(columns)] * count)
    for k, product, *scale in zip(steps, products, scales, scalars):
      sums = self.promote(product, k, scale, sums, 0, True)
    return sums

  def add_step(self, k, sums):
    """One step by itself: multiply, wait, promote."""
    ring, columns, scalars = self.ring, self.ring.t.columns, self.wait(k)
    fresh = ring.t.fresh or columns
    sa = None
    for at in range(0, columns, fresh):

      def multiply(acc, at=at, sa=sa):
        self.start(acc, k, pl.ds(at, fresh))
        sa = self.row_scales(k) if sa is None else sa  # beside the product
        return sa, acc[...]

      sa, product = pl.run_scoped(multiply, _accumulator(fresh))
      last = at + fresh == columns
      sums = self.promote(product, k, (sa, scalars), sums, at, last)
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
