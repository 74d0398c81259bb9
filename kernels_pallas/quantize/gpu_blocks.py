"""128x128 blocks of weights on Hopper, codes of both layouts in one pass.

A thread block owns one 128x128 block of one expert. Each of its two warpgroups finds
the largest magnitude of the whole block, then writes its half of the codes along rows,
and along the transpose. See `gpu_tiles` for what is common.

Shapes: E experts, K rows of a weight, N columns; a lower-case letter is that dimension
divided by 128, rounded up.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.quantize import gpu_tiles as tiles
from kernels_pallas.quantize import reference
from kernels_pallas.quantize.reference import TILE, Quantized


def quantize_blocks(
  w_EKN: jax.Array, power_of_two: bool, dtype, interpret=None
) -> tuple[Quantized, Quantized]:
  """(q_EKN, s_Ekn), (q_ENK, s_Enk) of BF16 weights."""
  E, K, N = w_EKN.shape
  k, n = pl.cdiv(K, TILE), pl.cdiv(N, TILE)
  codes = tiles.Codes(jnp.dtype(dtype), power_of_two, interpreted=interpret is not None)

  def body(w_ref, q_ref, qt_ref, s_ref, block, staging, maxima, loaded):
    e, i, j = (lax.axis_index(name) for name in ("e", "k", "n"))
    share = tiles.share()
    at = pl.ds(i * TILE + share, tiles.SHARE), pl.ds(j * TILE, TILE)
    plgpu.copy_gmem_to_smem(
      w_ref.at[(e, *at)], block.at[pl.ds(share, tiles.SHARE)], loaded
    )
    plgpu.barrier_wait(loaded)
    s = _scale_of(block, maxima.at[lax.axis_index("warpgroup")], codes)
    s_ref[e, i, j] = s
    for transposed, out_ref in ((False, q_ref), (True, qt_ref)):
      across, along = (j, i) if transposed else (i, j)

      def step(
        t, _, transposed=transposed, out_ref=out_ref, across=across, along=along
      ):
        start = share + t * tiles.STEP
        at = pl.ds(across * TILE + start, tiles.STEP), pl.ds(along * TILE, TILE)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        slot = staging.at[lax.axis_index("warpgroup"), t]
        x = tiles.read(block, start, transposed)
        slot[...] = tiles.divide(x, s, codes).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(slot, out_ref.at[(e, *at)])

      lax.fori_loop(0, tiles.SHARE // tiles.STEP, step, None)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  q_EKN, q_ENK, s_Ekn = plgpu.kernel(
    body,
    out_type=(
      jax.ShapeDtypeStruct((E, K, N), dtype),
      jax.ShapeDtypeStruct((E, N, K), dtype),
      jax.ShapeDtypeStruct((E, k, n), jnp.float32),
    ),
    scratch_types=[
      tiles.swizzled((TILE, TILE), jnp.bfloat16, 64),
      tiles.swizzled((tiles.WARPGROUPS, 2, tiles.STEP, TILE), dtype, 128),
      plgpu.SMEM((tiles.WARPGROUPS, tiles.STEP), jnp.float32),
      plgpu.Barrier(num_arrivals=tiles.WARPGROUPS),
    ],
    grid=(E, k, n),
    grid_names=("e", "k", "n"),
    num_threads=tiles.WARPGROUPS,
    thread_name="warpgroup",
    interpret=interpret,
  )(w_EKN)
  return (q_EKN, s_Ekn), (q_ENK, s_Ekn.swapaxes(1, 2))


def _scale_of(block, maxima, codes: tiles.Codes) -> jax.Array:
  """The scale of a whole block; each warpgroup finds it for itself.

  Rows live in different warps, so the last of the reduction goes through the shared
  memory `maxima`, of this warpgroup alone.
  """
  largest = jnp.abs(tiles.read(block, 0, False))
  for start in range(tiles.STEP, TILE, tiles.STEP):
    largest = jnp.maximum(largest, jnp.abs(tiles.read(block, start, False)))
  maxima[...] = tiles.amax(largest, 1, codes)
  of_rows = plgpu.load(maxima, layout=tiles.LAYOUT.reduce(0))
  magnitude = jnp.full(of_rows.shape, tiles.amax(of_rows, 0, codes))
  limit = float(jnp.finfo(codes.dtype).max)
  return jnp.max(reference.scales(magnitude, limit, codes.power_of_two))
