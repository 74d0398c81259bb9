"""Which tiles the FP8 products take, that they cover the output, and bad ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from experiments.benchmarks import fp8_matmul as benchmark
from kernels_pallas.fp8_matmul import gpu, tilings
from kernels_pallas.fp8_matmul.persistent import Tiling
from tests.kernels_pallas.test_fp8_matmul import forward_specs, token_specs


def test_table_of_tilings():
  """Every row is used at its own shape; shapes it does not hold get a default."""
  for (rows, n, k), tiling in tilings.FORWARD.items():
    assert tilings.forward(rows, n, k) == tiling
  for (i, j, tokens), tiling in tilings.WEIGHT_GRADIENT.items():
    assert tilings.weight_gradient(i, j, tokens) == tiling
  assert tilings.masked(4096, 640).warpgroups == 2
  for tiling in (tilings.forward(4096, 64, 128), tilings.grouped(4096, 64, 4)):
    assert tiling.columns == 64  # a wider tile would store what lies beyond upon it
  with pytest.raises(ValueError, match="an output of 64 columns needs tiles of 64"):
    jax.eval_shape(
      lambda *a: gpu.multiply(*a, tiling=Tiling()), *forward_specs(8, 64, 128)
    )


def test_tilings_of_few_rows():
  """As wide as leaves work for most multiprocessors; groups need 128 rows a tile."""
  for n, width in ((24576, 64), (7168, 64), (4096, 32), (2112, 16), (64, 16)):
    for rows, warpgroups in ((1, 1), (64, 1), (65, 2), (128, 2)):
      for depth, clusters in ((2048, True), (7168, False)):
        found = tilings.forward(rows, n, depth, clusters)
        assert (found.columns, found.warpgroups) == (width, warpgroups)
        assert found.split == 1
    assert tilings.masked(64, n).rows == tilings.grouped(64, n, 4).rows == 128
  few = Tiling(64, stages=2, together=3)
  with pytest.raises(ValueError, match="3 steps at once do not fit in 2 stages"):
    jax.eval_shape(lambda *a: gpu.multiply(*a, tiling=few), *forward_specs(8, 128, 128))


@pytest.mark.parametrize("m", [1, 64, 65, 128, 256, 4096, 8192])
def test_a_retune_tries_what_the_table_has(m):
  found = benchmark.candidates("forward", m, snakes=(4, 16))
  gradients = benchmark.candidates("dw", m, snakes=(4, 16))
  assert len(set(found)) == len(found) > len(tilings.known(m))
  for n, k in benchmark.SHAPES:
    assert tilings.forward(m, n, k) in found
    assert tilings.weight_gradient(n, k, m) in gradients
  for t in found if m in (64, 128, 4096) else []:
    jax.eval_shape(
      lambda *a, t=t: gpu.multiply(*a, tiling=t), *forward_specs(m, 512, 1280)
    )


def test_steps_are_fetched_together_where_they_are_even():
  """Those that thread blocks share and those of their own; of few, none are own."""
  few = tilings._FEW_ROWS + tilings._FEW_ROWS_PAIR
  for t in few + tilings._FEW_ROWS_LONG + tilings._FEW_ROWS_PAIR_LONG:
    assert t.together % t.fetched == t.stages % t.fetched == 0
    for steps in (1, 2, 3, 4, 5, 12, 16, 18, 56):
      found = tilings.of_steps(t, steps)
      own = t.own_last if steps >= t.split + t.own_last else 0
      assert found == dataclasses.replace(t, fetched=found.fetched, own_last=own)
      if found.fetched > 1:
        assert (steps - own) % (t.split * found.fetched) == own % found.fetched == 0
    assert tilings.of_steps(gpu._alone(t, 120, None), 56).own_last == 0
    assert tilings.of_steps(t, 56) == t
  for bad in (Tiling(64, 6, together=3, fetched=2), Tiling(64, 5, fetched=2)):
    with pytest.raises(ValueError, match="2 steps fetched at once must divide"):
      jax.eval_shape(
        lambda *a, t=bad: gpu.multiply(*a, tiling=t), *forward_specs(64, 512, 512)
      )


@pytest.mark.parametrize("across", [3, 8, 33, 40])
@pytest.mark.parametrize("down", [2, 4])
def test_tiles_of_a_column_are_run_side_by_side(down, across):
  tiles = jnp.arange(down * across)
  row, column = map(np.asarray, gpu._side_by_side(tiles, down, across))
  assert sorted(zip(row, column)) == [
    (r, c) for r in range(down) for c in range(across)
  ]
  for c in range(across):
    apart = np.diff(np.flatnonzero(column == c))
    assert (apart == min(8, across - c // 8 * 8)).all()


@pytest.mark.parametrize("rows", [1, 64, 128, 256])
@pytest.mark.parametrize("n", [64, 576, 1536, 2112, 4096, 7168, 24576])
def test_long_contractions_of_few_rows_are_split(rows, n):
  """Into parts that give most multiprocessors some, where N has enough columns."""
  t = tilings.forward(rows, n, 7168)
  blocks = -(-rows // t.rows) * -(-n // t.columns) * t.split
  if t.split > 1:
    assert blocks >= min(100, -(-rows // 64) * n // 32 * 2)
    alone = gpu._alone(t, 120, None)
    assert alone.split == 1 == gpu._alone(t, None, plgpu.InterpretGPUParams()).split
  else:
    assert blocks >= 100
  assert t.split == 1 or rows > 64 or n <= 4096


@pytest.mark.parametrize(
  ("tiling", "problem"),
  [
    (Tiling(64, 4, split=2, cluster=2), "only plain products of few rows"),
    (Tiling(64, 4, split=2, warpgroups=3), "only plain products of few rows"),
    (Tiling(32, 8, split=4), "a block's part of the columns must be a multiple of 16"),
    (Tiling(256, 2, split=2, own_last=1), "steps of its blocks' own needs one scale"),
  ],
)
def test_what_cannot_be_split(tiling, problem):
  with pytest.raises(ValueError, match=problem):
    jax.eval_shape(
      lambda *a: gpu.multiply(*a, tiling=tiling), *forward_specs(64, 512, 512)
    )


def test_steps_at_once_need_one_scale():
  specs = token_specs(128, 128, 256)
  with pytest.raises(ValueError, match="steps at once need one scale"):
    jax.eval_shape(
      lambda *a: gpu.multiply_tokens(*a, tiling=Tiling(64, 4, together=2)), *specs
    )


def test_tables_of_blocks_are_not_split():
  blocks = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  with pytest.raises(ValueError, match="tiles of a table of blocks are not split"):
    jax.eval_shape(
      lambda *a: gpu.multiply(*a, tiling=Tiling(64, 4, split=2)),
      *forward_specs(128, 512, 512),
      blocks,
    )


@pytest.mark.parametrize(
  ("rows", "columns"), [(8, 2112), (64, 7168), (200, 2112), (4096, 7168), (8200, 640)]
)
@pytest.mark.parametrize(
  "t",
  [
    Tiling(stages=4, warpgroups=3),
    Tiling(stages=4, warpgroups=3, cluster=2),
    Tiling(stages=4, warpgroups=1, split=2),
  ],
  ids=str,
)
def test_tiles_cover_the_output_once(rows, columns, t):
  units, across = -(-rows // 64), tilings.across(columns, t)
  assert 0 <= across * t.cluster * t.columns - columns < t.cluster * t.columns
  for cut in (tilings.cut(rows, columns, t), tilings.remainder(rows, t)):
    tiles = jnp.arange((cut.whole + cut.lower) * across)
    places = jax.vmap(lambda i, c=cut: gpu._place(i, c, across, t))(tiles)
    start, column, busy = (
      np.full(tiles.size, t.warpgroups) if place is None else np.asarray(place)
      for place in places
    )
    covered = np.zeros((units + 3, across), int)
    for first, at, height in zip(start // 64, column, busy):
      covered[first : first + height, at] += 1
    assert (covered[:units] == 1).all()
    assert not covered[units:].any()


def test_clusters_are_for_the_whole_gpu_and_whole_sums():
  """Beside another kernel two free multiprocessors may not be neighbours."""
  pair = tilings.forward(4096, 4096, 7168)
  assert pair.cluster == 2 == gpu._alone(pair, None, None).cluster
  assert gpu._alone(pair, 120, None).cluster == 1
  assert gpu._alone(pair, None, plgpu.InterpretGPUParams()).cluster == 1
  for bad in (Tiling(64, 7, together=3, cluster=2), Tiling(256, 4, 4, 128, cluster=2)):
    with pytest.raises(ValueError, match="clusters need steps one by one and whole"):
      jax.eval_shape(
        lambda *a, t=bad: gpu.multiply(*a, tiling=t), *forward_specs(512, 512, 512)
      )


def test_lower_tiles_fill_the_last_wave():
  tall = Tiling(stages=4, warpgroups=3)
  assert tilings.cut(192 * 132, 128, tall) == tilings.Cut(132)  # one wave: none needed
  for rows, columns in ((4096, 4096), (4096, 7168), (8192, 7168)):
    across, work = columns // 128, rows * columns / (192 * 128)
    waves = -(-(-(-rows // 192) * across) // 132)
    assert work / 132 <= tilings.cut(rows, columns, tall).time(across, 132) < waves
