"""Tilings of the Hopper kernel by shape.

Measured on an NVIDIA H100 80GB HBM3, 2026-11-22, at M = 4096 where the table has a
shape. Retune with `python -m experiments.benchmarks.fp8_matmul --retune` and write what
it prints first for a shape here. Shapes that are not in the table get the one that is
expected to be fastest: waves of tiles over the multiprocessors, times the time of a
tile.
"""

import math

from kernels_pallas.fp8_matmul.persistent import Tiling

_SMS = 132
_SMALL_ROWS = 256
_SMALL = Tiling(columns=128, stages=5)
_NARROW = Tiling(columns=64, stages=7)
_UNEVEN = Tiling(columns=192, stages=4)
_UNEVEN_PAIR = Tiling(columns=192, stages=4, share="a")
_WIDE_PAIR = Tiling(columns=256, stages=4, fresh=128, share="a")

# (M, N, K) -> tiling.
FORWARD = {
  (4096, 2112, 7168): _UNEVEN,
  (4096, 4096, 7168): _WIDE_PAIR,
  (4096, 32768, 512): _UNEVEN_PAIR,
}
# (I, J, tokens) -> tiling.
WEIGHT_GRADIENT = {(4096, 7168, 4096): _UNEVEN}


def forward(rows: int, columns: int, depth: int, grouped: bool) -> Tiling:
  """For activations times weights; grouped rows have several matrices."""
  if columns == _NARROW.columns:  # a wider tile's last store would miss and overwrite
    return _NARROW
  found = FORWARD.get((rows, columns, depth))
  if found and not grouped:
    return found
  if rows <= _SMALL_ROWS:
    return _narrow(rows, columns)
  if depth <= 512:  # little but stores: two multiprocessors with less to write each
    return _UNEVEN_PAIR
  return _fastest(rows, columns, {_WIDE_PAIR: 1.0, _UNEVEN: 1.03})


def weight_gradient(i: int, j: int, tokens: int) -> Tiling:
  """For the gradient of a weight [i, j]."""
  found = WEIGHT_GRADIENT.get((i, j, tokens))
  return found or _fastest(i, j, {_UNEVEN: 1.0, _SMALL: 1.09})


def _fastest(rows: int, columns: int, choices: dict[Tiling, float]) -> Tiling:
  """The least waves times columns times the relative time of a column."""

  def cost(t: Tiling) -> float:
    _, wide = t.pair
    tiles = math.ceil(rows / t.rows) * math.ceil(columns / (t.columns * wide))
    return math.ceil(tiles * wide / _SMS) * t.columns * choices[t]

  return min(choices, key=cost)


def _narrow(rows: int, columns: int) -> Tiling:
  """Few rows: narrow tiles, so that every multiprocessor fetches weights."""
  for width, stages in ((128, 5), (64, 7)):
    t = Tiling(columns=width, stages=stages, snake=1)
    if math.ceil(rows / t.rows) * math.ceil(columns / width) >= _SMS:
      return t
  return Tiling(columns=32, stages=8, snake=1)
