"""128x128 blocks of weights on Hopper, codes of both layouts in one pass.

Each of a team's four warpgroups finds the largest magnitude of 32 rows of a block; they
exchange these through shared memory, then each writes 32 rows of codes, and 32 of the
transpose's.

Shapes: E experts, K rows of a weight, N columns; a lower-case letter is that dimension
divided by 128, rounded up.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.quantize import gpu_arithmetic as arithmetic
from kernels_pallas.quantize.gpu_arithmetic import BY_ROW, LAYOUT, STEP, Codes
from kernels_pallas.quantize.gpu_read import read
from kernels_pallas.quantize.gpu_ring import (
  WARPGROUPS,
  Source,
  for_each_tile,
  swizzled,
  warpgroup,
)
from kernels_pallas.quantize.reference import TILE, Quantized

# A block's rows, four to a lane, in each warp.
_OVER_LANES = plgpu.Layout.TILED(
  plgpu.Tiling(((TILE,), (4,))),
  warp_dims=(plgpu.Replicated(4),),
  lane_dims=(-2,),
  vector_dim=-1,
)


def quantize_blocks(
  w_EKN: jax.Array, power_of_two: bool, dtype, num_sms: int | None, interpret=None
) -> tuple[Quantized, Quantized]:
  """(q_EKN, s_Ekn), (q_ENK, s_Enk) of BF16 weights, on `num_sms` or all SMs."""
  E, K, N = w_EKN.shape
  k, n = pl.cdiv(K, TILE), pl.cdiv(N, TILE)
  codes = Codes(jnp.dtype(dtype), power_of_two, interpreted=interpret is not None)

  def block_at(e, i, j):
    return e, pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)

  def compute(place, t, tiles, _, out_refs, scratch):
    (e, i, j), [block], (q_ref, s_ref, qt_ref, st_ref) = place, tiles, out_refs
    staging, maxima, known = scratch
    start = warpgroup() * STEP
    s = _scale(block, start, maxima.at[lax.rem(t, 2)], known, codes)

    @pl.when(start == 0)
    def store_scale():
      s_ref[e, i, j] = s
      st_ref[e, j, i] = s

    s = plgpu.layout_cast(jnp.full((STEP,), s), BY_ROW)
    r = arithmetic.reciprocals(s, codes)
    for transposed, out_ref, row, column in ((0, q_ref, i, j), (1, qt_ref, j, i)):
      plgpu.wait_smem_to_gmem(1, wait_read_only=True)
      slot = staging.at[warpgroup(), transposed]
      x = read(block, start, 0, TILE, bool(transposed), codes)
      slot[...] = arithmetic.divide(x, s, r, codes).astype(dtype)
      plgpu.commit_smem()
      at = pl.ds(row * TILE + start, STEP), pl.ds(column * TILE, TILE)
      plgpu.copy_smem_to_gmem(slot, out_ref.at[(e, *at)])

  q_EKN, s_Ekn, q_ENK, s_Enk = for_each_tile(
    compute,
    (E, k, n),
    [Source(w_EKN, (TILE, TILE), block_at)],
    [],
    [
      jax.ShapeDtypeStruct((E, K, N), dtype),
      jax.ShapeDtypeStruct((E, k, n), jnp.float32),
      jax.ShapeDtypeStruct((E, N, K), dtype),
      jax.ShapeDtypeStruct((E, n, k), jnp.float32),
    ],
    lambda teams: [
      swizzled((teams, WARPGROUPS, 2, STEP, TILE), dtype),
      plgpu.SMEM((teams, 2, TILE), jnp.float32),
      plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=teams),
    ],
    WARPGROUPS * 2 * STEP * TILE + 2 * TILE * 4,
    num_sms,
    interpret,
  )
  return (q_EKN, s_Ekn), (q_ENK, s_Enk)


def _scale(block, start, maxima, known, codes: Codes) -> jax.Array:
  """The scale of a block, of which each warpgroup looks at 32 rows.

  `maxima` takes the largest magnitude of each row. Blocks use its two copies in turn:
  nobody writes to one before all have passed the barrier of the block after, and with
  that have read it.
  """
  x = plgpu.load(block.at[pl.ds(start, STEP), :], layout=LAYOUT)
  maxima[pl.ds(start, STEP)] = arithmetic.amax(_pairwise(x), 1, codes)
  plgpu.barrier_arrive(known)
  plgpu.barrier_wait(known)
  rows = plgpu.load(maxima, layout=_OVER_LANES)
  magnitude = jnp.full(rows.shape, arithmetic.amax(rows, 0, codes))
  magnitude = plgpu.layout_cast(magnitude, _OVER_LANES)
  return jnp.max(arithmetic.scales(magnitude, codes, _OVER_LANES))


def _pairwise(x: jax.Array) -> jax.Array:
  """FP32, eight columns: the largest magnitudes of each eighth, or NaN.

  Two BF16 are compared by one instruction, and few are left to widen.
  """
  x = jnp.abs(x)
  while x.shape[1] > 8:
    half = x.shape[1] // 2
    x = jnp.maximum(x[:, :half], x[:, half:])
  return x.astype(jnp.float32)
