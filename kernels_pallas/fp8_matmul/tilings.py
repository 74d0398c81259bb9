"""Tilings of the Hopper kernel by shape, as measured on an H100.

Retune with `python -m experiments.benchmarks.fp8_matmul --retune` and write the first
row that it prints for a shape here. Shapes that are not in the table get what suited
their nearest kin.
"""

import math

from kernels_pallas.fp8_matmul.persistent import ROWS, Tiling

_SMS = 132
_WIDE = Tiling(columns=256, stages=4, fresh=128, share="a")
_UNEVEN = Tiling(columns=192, stages=4)
_OVERLAPPED = Tiling(columns=128, stages=5, overlap=4)

# (M, N, K) -> tiling.
FORWARD: dict[tuple[int, int, int], Tiling] = {}
# (I, J, tokens) -> tiling.
WEIGHT_GRADIENT: dict[tuple[int, int, int], Tiling] = {}


def forward(rows: int, columns: int, depth: int, grouped: bool) -> Tiling:
  """For activations times weights; grouped rows have several matrices."""
  found = FORWARD.get((rows, columns, depth))
  if found and not grouped:
    return found
  if rows <= 2 * ROWS:
    return _narrow(rows, columns)
  return min((_WIDE, _UNEVEN), key=lambda t: _waves(rows, columns, t) * t.columns)


def weight_gradient(i: int, j: int, tokens: int) -> Tiling:
  """For the gradient of a weight [i, j]."""
  return WEIGHT_GRADIENT.get((i, j, tokens), _OVERLAPPED)


def _narrow(rows: int, columns: int) -> Tiling:
  """Few rows: narrow tiles, so that every multiprocessor fetches weights."""
  for width, stages in ((128, 5), (64, 7)):
    if math.ceil(rows / ROWS) * math.ceil(columns / width) >= _SMS:
      return Tiling(columns=width, stages=stages, snake=1)
  return Tiling(columns=32, stages=8, snake=1)


def _waves(rows: int, columns: int, t: Tiling) -> int:
  """Rounds of tiles that the multiprocessors make."""
  return math.ceil(math.ceil(rows / ROWS) * math.ceil(columns / t.columns) / _SMS)
