"""A counter in global memory that tells teams which tile is next.

The answer takes its time, so a team asks a tile ahead, and the thread that asked keeps
it until all of its warpgroup want to know.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir.dialects import arith

from kernels_pallas import hopper

_SCALAR = plgpu.Layout.WG_SPLAT
_INT = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), _SCALAR)


def ask(counter: Any, asks: jax.Array) -> jax.Array:
  """Raises the counter by one where `asks`; what it was arrives in one thread.

  Nobody waits for it before `answer`.
  """

  def raise_by_one(_, counter, asks):
    thread = mgpu.single_thread_predicate(mgpu.ThreadSubset.WARPGROUP)
    asks = arith.andi(arith.extui(hopper.int32(), thread), asks.registers.item())
    value = mgpu_utils.inline_ptx(
      "{.reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0;"
      "@p atom.relaxed.gpu.global.add.u32 $0, [$1], 1;}",
      *(mgpu_utils.memref_ptr(counter), asks),
      result_types=hopper.int32(),
      has_side_effects=True,
    )
    return mgpu.FragmentedArray.splat(value, (), is_signed=True)

  types = plgpu.RefType(), _SCALAR
  run: Any = plgpu.inline_mgpu(arg_types=types, return_type=_INT)(raise_by_one)
  return run(counter, asks.astype(jnp.int32))


def answer(asked: jax.Array, word: Any) -> jax.Array:
  """To all of a warpgroup what its thread that asked knows, by way of shared memory."""

  def tell(_, asked, word):
    thread = mgpu.single_thread_predicate(mgpu.ThreadSubset.WARPGROUP)
    address = mgpu_utils.memref_ptr(word)
    mgpu_utils.inline_ptx(
      "st.shared.b32 [$0], $1;",
      *(address, asked.registers.item()),
      predicate=thread,
      has_side_effects=True,
    )
    mgpu_utils.warpgroup_barrier()
    value = mgpu_utils.inline_ptx(
      "ld.shared.b32 $0, [$1];",
      address,
      result_types=hopper.int32(),
      has_side_effects=True,
    )
    return mgpu.FragmentedArray.splat(value, (), is_signed=True)

  types = _SCALAR, plgpu.RefType()
  run: Any = plgpu.inline_mgpu(arg_types=types, return_type=_INT)(tell)
  return run(asked, word)
