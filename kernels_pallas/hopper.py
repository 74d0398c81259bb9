"""What Mosaic GPU kernels for NVIDIA Hopper share: its size, its memory's layout, and
what they write inline."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

_SMS = 132  # of an H100 SXM, an H200 and an H800


def traced_once(*options: str) -> Callable[[Callable], Callable]:
  """A decorator of kernels: traced once for each shape and value of `options`.

  Calls that share a jaxpr are lowered to one kernel, which is compiled once; without,
  each call in a step is lowered and compiled by itself, which takes about a second.
  The call is inlined, so that nothing around it sees a `jax.jit`.
  """
  return functools.partial(jax.jit, static_argnames=options, inline=True)


def in_place(kernel: Callable[[Any], None], state: Any) -> Any:
  """What `kernel`, called with references to `state`, leaves there.

  As `jax.new_ref`, but without its effect, which the transformations of a training step
  refuse. Buffers are reused where the caller lets go of them.
  """
  return pl.run_state(kernel)(state)


def persistent(
  body: Callable[..., None],
  scratch: dict[str, Any],
  name: str,
  out: jax.ShapeDtypeStruct,
  add_to: jax.Array | None,
  *,
  clusters: int,
  blocks: int,
  warpgroups: int,
  interpret,
) -> Callable[..., jax.Array]:
  """A function of operands that runs `body(*operands, out, **scratch)`.

  Args:
    body: what a thread block does, with references; it fills `out`.
    scratch: its shared memory and barriers.
    name: the kernel's.
    out: of a new array.
    add_to: an array that `body` gets as `out` instead, to be added to in place.
    clusters: how many, an axis "sm".
    blocks: thread blocks of each; an axis "block" where there are several.
    warpgroups: of a thread block, an axis "warpgroup".
    interpret: None for a GPU.
  """

  def scoped(*refs):
    run = functools.partial(body, *refs)
    pl.run_scoped(run, collective_axes="warpgroup", **scratch)

  mesh = plgpu.Mesh(
    grid=(clusters,),
    grid_names=("sm",),
    cluster=(blocks,) if blocks > 1 else (),
    cluster_names=("block",) if blocks > 1 else (),
    num_threads=warpgroups,
    thread_name="warpgroup",
  )
  kernel: Any = functools.partial(
    pl.kernel,
    mesh=mesh,
    compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    interpret=interpret,
    name=name,
  )
  if add_to is None:
    return lambda *operands: kernel(scoped, out_type=(out,))(*operands)[0]

  add = kernel(scoped, out_type=())
  return lambda *operands: in_place(lambda sums: add(*operands, sums), add_to)


def streaming_multiprocessors() -> int:
  """Of the GPU that this is traced for; of an H100 when that is not known."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None and device.platform == "gpu" and device.num_cores:
    return device.num_cores
  if jax.default_backend() == "gpu":
    return jax.devices()[0].core_count
  return _SMS


def swizzled(shape: tuple[int, ...], dtype, bytes_: int = 128):
  """Shared memory in the layout that TMA and wgmma both take, rows of `bytes_`."""
  return plgpu.SMEM(shape, dtype, transforms=transforms(dtype, bytes_))


def transforms(dtype, bytes_: int) -> tuple[Any, Any]:
  """Those of `swizzled`."""
  columns = bytes_ // jnp.dtype(dtype).itemsize
  return (
    plgpu.TilingTransform((8, columns)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(bytes_),  # pyright: ignore[reportAbstractUsage]
  )


def store(sums, smem, out_tile, add):
  """Casts and stores a warpgroup's sums through two slots of shared memory."""
  columns = smem.shape[-1]
  width = sums[0].shape[1]
  pieces = len(sums) * width // columns
  for i in range(pieces):
    part, at = divmod(i * columns, width)
    # The slot of the piece before may still be read. An odd number of pieces ends with
    # the slot that the next tile begins with.
    plgpu.wait_smem_to_gmem(0 if i == 0 and pieces % 2 else 1, wait_read_only=True)
    smem[i % 2] = sums[part][:, at : at + columns].astype(smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
      smem.at[i % 2],
      out_tile.at[:, i * columns : (i + 1) * columns],
      reduction_op="add" if add else None,
    )


def int32() -> ir.Type:
  """Of a scalar in inline instructions."""
  return ir.IntegerType.get_signless(32)


def int32_constant(value: int) -> ir.Value:
  return arith.constant(int32(), value)


def computed(emit: Callable[[], ir.Value]) -> jax.Array:
  """The int32 that `emit()` writes instructions for."""

  def inline(_):
    return mgpu.FragmentedArray.splat(emit(), (), is_signed=True)

  result = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), plgpu.Layout.WG_SPLAT)
  run: Any = plgpu.inline_mgpu(return_type=result)(inline)
  return run()


def zero_of_each_thread() -> jax.Array:
  """0, of which the compiler does not know that all threads of a warp have it.

  What is read at an address with it stays in the threads' registers. In a uniform one
  it would be waited for as soon as it is asked for.
  """
  ptx = "{ .reg .b32 mask; mov.u32 mask, %lanemask_gt; and.b32 $0, mask, 1; }"
  return computed(lambda: mgpu_utils.inline_ptx(ptx, result_types=int32()))
