"""Tilings of the Hopper kernel by shape.

Measured on NVIDIA H200s, 2026-11-22 and 23. Retune with `python -m
experiments.benchmarks.fp8_matmul --retune` and write what it prints first for a shape
here, if it is clearly first and `python -m experiments.benchmarks.listing` finds that
nothing is spilled. Shapes that are not in the tables get the tiling that is expected to
be fastest: tiles of the busiest multiprocessor, times the time of a tile.
"""

import dataclasses
import math

from kernels_pallas.fp8_matmul.persistent import WARPGROUP_ROWS, Tiling

_SMS = 132
_SMALL_ROWS = 256
_SMALL = Tiling(columns=128, stages=5)
_NARROW = Tiling(columns=64, stages=7)
_UNEVEN = Tiling(columns=192, stages=4)
_WIDE = Tiling(columns=256, stages=4, fresh=128)
_TALL = Tiling(columns=128, stages=4, snake=4, warpgroups=3)
_TALL_16 = dataclasses.replace(_TALL, snake=16)
_TALL_PAIR = dataclasses.replace(_TALL, cluster=2)

# (M, N, K) -> tiling, where the default, most often _TALL_PAIR, is not the fastest.
# With one step a turn of the loop, as for K = 512, pairs took 1 to 3% longer at three
# other shapes; these two are not timed.
FORWARD = {(4096, 32768, 512): _TALL, (8192, 32768, 512): _TALL}
# (I, J, tokens) -> tiling.
WEIGHT_GRADIENT: dict[tuple[int, int, int], Tiling] = {}
# Time of a value of the output beside that of tall tiles. Measured, but for _UNEVEN and
# _WIDE of dense rows and _WIDE of groups, which were before their stores waited, and
# _SMALL, for which _UNEVEN's change was taken over. Those of groups were beside single
# thread blocks, whose lower tiles had 64 rows.
_FORWARD_COST = {_TALL_PAIR: 1.0, _UNEVEN: 1.05, _WIDE: 1.15}
_GROUPED_COST = {_TALL_PAIR: 1.0, _UNEVEN: 1.1, _WIDE: 1.15}
_WEIGHT_GRADIENT_COST = {_TALL_16: 1.0, _UNEVEN: 1.1, _SMALL: 1.15}
# For few rows, the widest first: with one warpgroup, and with the two that more rows
# and groups need. What V3's shapes take was measured at M = 64 and 128 on an H100,
# 2026-11-23; the narrowest and groups were not.
_FEW_ROWS = [
  Tiling(64, 12, 1, warpgroups=1, together=4, fetched=2),
  Tiling(32, 16, 1, warpgroups=1, together=4, fetched=2),
  Tiling(16, 16, 1, warpgroups=1, together=8, fetched=2),
]
_FEW_ROWS_PAIR = [
  Tiling(64, 6, 1, together=2, fetched=2),
  Tiling(32, 8, 1, together=4, fetched=2),
  Tiling(16, 10, 1, together=5),
]
# The same of a long contraction, which thread blocks may split: 7,168 was long enough,
# 2,048 was not.
_LONG = 4096
_SPLIT = [
  Tiling(64, 12, 1, warpgroups=1, together=4, fetched=2, split=2, own_last=8),
  Tiling(32, 12, 1, warpgroups=1, together=4, fetched=2, split=2, own_last=8),
]
_FEW_ROWS_LONG = [_FEW_ROWS[0], *_SPLIT]
_FEW_ROWS_PAIR_LONG = [
  Tiling(128, 4, 1, together=2, fetched=2, split=2),
  Tiling(64, 6, 1, together=2, fetched=2, split=2, own_last=4),
  *_SPLIT,
]
_ENOUGH_BLOCKS = 100  # 112 tiles of 64 columns were faster than 224 of 32


# Time of a tile of which so many of three warpgroups have work: one alone waits for its
# own promotion, two hide a part of it. Estimates.
_TIME_OF_BUSY = {1: 0.5, 2: 0.75, 3: 1.0}


@dataclasses.dataclass(frozen=True)
class Cut:
  """Rows of an output: whole tiles, then lower ones.

  Lower tiles fill the last wave, in which whole ones would leave most multiprocessors
  without work, and hold what is left of the rows.

  Attributes:
    whole: tiles of all the tiling's rows.
    lower: tiles after them.
    busy: warpgroups, of 64 rows each, that work on one of these.
  """

  whole: int
  lower: int = 0
  busy: int = 0

  def time(self, columns: int, sms: int) -> float:
    """Of the multiprocessor with most work, in whole tiles, `columns` tiles across.

    Tile i is the multiprocessor's of number i % sms. In clusters both are theirs.
    """
    whole, lower = self.whole * columns, self.lower * columns
    last = _TIME_OF_BUSY.get(self.busy, 0)

    def share(tiles: int, first: int) -> int:
      return (tiles - first + sms - 1) // sms if first < tiles else 0

    return max(
      share(whole, sm) + last * share(lower, (sm - whole) % sms) for sm in range(sms)
    )


def cut(rows: int, columns: int, t: Tiling, sms: int | None = None) -> Cut:
  """The rows of an output [rows, columns] in the least time."""
  if t.warpgroups < 3:
    return Cut(math.ceil(rows / t.rows))
  units, columns = math.ceil(rows / WARPGROUP_ROWS), across(columns, t)
  cuts = [remainder(rows, t)]
  most = units // t.warpgroups
  for whole in range(most, max(-1, most - 4), -1):
    cuts.append(Cut(whole, units - t.warpgroups * whole, 1))
  sms = (sms or _SMS) // t.cluster
  return min(cuts, key=lambda c: (c.time(columns, sms), c.lower))


def across(columns: int, t: Tiling) -> int:
  """Tiles of a row of tiles; those of a cluster count as one."""
  return math.ceil(columns / (t.columns * t.cluster))


def remainder(rows: int, t: Tiling) -> Cut:
  """As many whole tiles as there are, and one lower one for what is left."""
  if t.warpgroups < 3:
    return Cut(math.ceil(rows / t.rows))
  whole, left = divmod(math.ceil(rows / WARPGROUP_ROWS), t.warpgroups)
  return Cut(whole, 1, left) if left else Cut(whole)


def forward(rows: int, columns: int, depth: int, clusters: bool = True) -> Tiling:
  """For activations times weights; `clusters`: of thread blocks, where they serve."""
  if rows <= _SMALL_ROWS or columns == _NARROW.columns:
    return _narrow(rows, columns, splits=clusters and depth >= _LONG)
  found = FORWARD.get((rows, columns, depth))
  return found or _fastest(rows, columns, _FORWARD_COST)


def grouped(rows: int, columns: int, groups: int) -> Tiling:
  """For groups of rows, each a multiple of 128, with a matrix each."""
  if rows <= _SMALL_ROWS or columns == _NARROW.columns:
    return _narrow(rows, columns, in_groups=True)
  # A tall tile holds rows of one group, which on average has one lower tile of 128.
  # That takes the time of some 16 rows more.
  return _fastest(rows, columns, _GROUPED_COST, {_TALL_PAIR: 16 * groups})


def masked(rows: int, columns: int) -> Tiling:
  """For groups of a fixed capacity, in all so many rows."""
  if rows <= _SMALL_ROWS or columns == _NARROW.columns:
    return _narrow(rows, columns, in_groups=True)
  return _fastest(
    rows, columns, {t: c for t, c in _GROUPED_COST.items() if t != _TALL_PAIR}
  )


def weight_gradient(i: int, j: int, tokens: int) -> Tiling:
  """For the gradient of a weight [i, j]."""
  found = WEIGHT_GRADIENT.get((i, j, tokens))
  return found or _fastest(i, j, _WEIGHT_GRADIENT_COST)


def known(rows: int) -> list[Tiling]:
  """Every tiling that activations of so many rows times weights may get."""
  if rows > _SMALL_ROWS:
    return [*_FORWARD_COST, *FORWARD.values()]
  if rows > WARPGROUP_ROWS:
    return [*_FEW_ROWS_PAIR, *_FEW_ROWS_PAIR_LONG]
  return [*_FEW_ROWS, *_FEW_ROWS_LONG]


def of_steps(t: Tiling, steps: int) -> Tiling:
  """The tiling for so many steps of a tile.

  Copies take several where all that is copied is even; thread blocks that split a tile
  have none of their own where they would not have one each to share.
  """
  last = t.own_last if t.split > 1 and steps - t.own_last >= t.split else 0
  share, left = divmod(steps - last, t.split)
  if left:
    return dataclasses.replace(t, fetched=1, own_last=last)
  fetched = math.gcd(t.fetched, share, last)
  return dataclasses.replace(t, fetched=fetched, own_last=last)


def _fastest(
  rows: int,
  columns: int,
  cost_of: dict[Tiling, float],
  missing_rows: dict[Tiling, int] | None = None,
) -> Tiling:
  """The tiling with the least time."""

  def cost(t: Tiling) -> float:
    if missing_rows is None:
      tiles = cut(rows, columns, t).time(across(columns, t), _SMS // t.cluster)
    else:  # groups are cut by sizes that are not known here
      high = math.ceil((rows + missing_rows.get(t, 0)) / t.rows)
      tiles = math.ceil(high * across(columns, t) / _SMS)
    return tiles * t.rows * t.columns * cost_of[t]

  return min(cost_of, key=cost)


def _narrow(
  rows: int, columns: int, in_groups: bool = False, splits: bool = False
) -> Tiling:
  """Few rows or columns: narrow tiles, so that most multiprocessors fetch weights.

  An output of 64 columns wants them too: of a wider tile, what lies beyond the output
  would be stored upon it.
  """
  if rows > _SMALL_ROWS:
    return _NARROW
  one = rows <= WARPGROUP_ROWS and not in_groups
  by_width = _FEW_ROWS if one else _FEW_ROWS_PAIR
  if splits:
    by_width = _FEW_ROWS_LONG if one else _FEW_ROWS_PAIR_LONG

  def blocks(t: Tiling) -> int:
    return math.ceil(rows / t.rows) * math.ceil(columns / t.columns) * t.split

  enough = (t for t in by_width if blocks(t) >= _ENOUGH_BLOCKS)
  return next(enough, by_width[-1])
