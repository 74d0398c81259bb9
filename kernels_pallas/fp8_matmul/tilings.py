"""Tilings of the Hopper kernel by shape.

Measured on an NVIDIA H200, 2026-11-22, at M = 4096 where the table has a shape. Retune
with `python -m experiments.benchmarks.fp8_matmul --retune` and write what it prints
first for a shape here, if it is clearly first. Shapes that are not in the table get the
tiling that is expected to be fastest: waves of tiles over the multiprocessors, times
the time of a tile. Clusters are in no default: with the wait that they need before a
slot is free again they were no faster (885 us against 888 at (4096, 7168, 16384)).
"""

import math

from kernels_pallas.fp8_matmul.persistent import Tiling

_SMS = 132
_SMALL_ROWS = 256
_SMALL = Tiling(columns=128, stages=5)
_NARROW = Tiling(columns=64, stages=7)
_UNEVEN = Tiling(columns=192, stages=4)
_WIDE = Tiling(columns=256, stages=4, fresh=128)
_TALL = Tiling(columns=128, stages=4, warpgroups=3)

# (M, N, K) -> tiling. Without clusters _TALL, the default, was first or within 2%.
FORWARD: dict[tuple[int, int, int], Tiling] = {}
# (I, J, tokens) -> tiling.
WEIGHT_GRADIENT = {(2112, 7168, 4096): _UNEVEN, (32768, 512, 4096): _SMALL}
# Time of a value of the output beside that of _TALL. Measured, but for _UNEVEN and
# _WIDE forward: 1.02 before its stores waited, 1.1 in a cluster without the wait.
_FORWARD_COST = {_TALL: 1.0, _UNEVEN: 1.05, _WIDE: 1.15}
_WEIGHT_GRADIENT_COST = {_TALL: 1.0, _UNEVEN: 1.045, _SMALL: 1.11}


def forward(rows: int, columns: int, depth: int) -> Tiling:
  """For activations times weights."""
  if rows <= _SMALL_ROWS or columns == _NARROW.columns:
    return _narrow(rows, columns)
  found = FORWARD.get((rows, columns, depth))
  return found or _fastest(rows, columns, _FORWARD_COST)


def grouped(rows: int, columns: int, groups: int) -> Tiling:
  """For groups of rows, each a multiple of 128, with a matrix each."""
  if rows <= _SMALL_ROWS or columns == _NARROW.columns:
    return _narrow(rows, columns)
  # A tall tile holds rows of one group: on average 64 of the last are missing.
  return _fastest(rows, columns, _FORWARD_COST, {_TALL: 64 * groups})


def masked(rows: int, columns: int) -> Tiling:
  """For groups of a fixed capacity, in all so many rows."""
  if rows <= _SMALL_ROWS or columns == _NARROW.columns:
    return _narrow(rows, columns)
  return _fastest(rows, columns, {t: c for t, c in _FORWARD_COST.items() if t != _TALL})


def weight_gradient(i: int, j: int, tokens: int) -> Tiling:
  """For the gradient of a weight [i, j]."""
  found = WEIGHT_GRADIENT.get((i, j, tokens))
  return found or _fastest(i, j, _WEIGHT_GRADIENT_COST)


def _fastest(
  rows: int,
  columns: int,
  cost_of: dict[Tiling, float],
  missing_rows: dict[Tiling, int] | None = None,
) -> Tiling:
  """The least waves of tiles times the time of one."""
  missing_rows = missing_rows or {}

  def cost(t: Tiling) -> float:
    _, wide = t.pair
    high = rows + missing_rows.get(t, 0)
    tiles = math.ceil(high / t.rows) * math.ceil(columns / (t.columns * wide))
    return math.ceil(tiles * wide / _SMS) * t.rows * t.columns * cost_of[t]

  return min(cost_of, key=cost)


def _narrow(rows: int, columns: int) -> Tiling:
  """Few rows or columns: narrow tiles, so that every multiprocessor fetches weights.

  An output of 64 columns wants them too: of a wider tile, what lies beyond the output
  would be stored upon it.
  """
  if columns == _NARROW.columns:
    return _NARROW
  for width, stages in ((128, 5), (64, 7)):
    t = Tiling(columns=width, stages=stages, snake=1)
    if math.ceil(rows / t.rows) * math.ceil(columns / width) >= _SMS:
      return t
  return Tiling(columns=32, stages=8, snake=1)
