"""All-to-all on TPU: a remote DMA from each row straight to its place on another chip.

The kernel walks over blocks of addresses, starts a DMA for each, in HBM at both ends,
and at the end waits for as many rows as it sent and as are to arrive. Before the first,
all ranks of the axis meet at a barrier: until then a peer may still use the memory that
is to become its receive buffer. Rows are padded to whole vectors of 128 values.

Shape suffixes: M entries, A copies of a row, P = M x A addresses, C rows received,
W values of a row.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.all_to_all.route import Axis

_LANES = 128
_BLOCK = 1024  # addresses in scalar memory at a time
_BARRIER = 5  # which of the chip's barrier semaphores


def unsupported(values: Sequence[jax.Array]) -> str | None:
  """Why this kernel cannot send such rows, or None when it can."""
  narrow = [v.dtype.name for v in values if v.dtype.itemsize > 4]
  return f"sends values of at most 4 bytes, got {narrow}: cast them" if narrow else None


def send_rows(
  values: Sequence[jax.Array],
  address_MA: jax.Array,
  count: jax.Array,
  received: jax.Array,
  rows: int,
  axis: Axis,
  source_M: jax.Array | None = None,
  interpret=False,
) -> list[jax.Array]:
  """As `kernels_pallas.all_to_all.send_rows`; rows that nobody sends to hold anything.

  `interpret` is for tests.
  """
  flat = [_in_vectors(value) for value in values]
  entries, copies = address_MA.shape
  if source_M is None:
    source_M = jnp.arange(entries, dtype=jnp.int32)
  source_P = jnp.broadcast_to(source_M[:, None], address_MA.shape)
  padding = (0, -address_MA.size % _BLOCK)
  tables = [
    jnp.pad(table.reshape(-1), padding, constant_values=-1)
    for table in (address_MA, source_P)
  ]
  block = pl.BlockSpec((_BLOCK,), lambda i, numbers: (i,), memory_space=pltpu.SMEM)
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  outs = pl.pallas_call(
    functools.partial(_send, len(flat), copies, rows, axis),
    out_shape=[jax.ShapeDtypeStruct((rows, *v.shape[1:]), v.dtype) for v in flat],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(len(tables[0]) // _BLOCK,),
      in_specs=[block, block, *[anywhere] * len(flat)],
      out_specs=[anywhere] * len(flat),
      scratch_shapes=[
        pltpu.SMEM((1,), jnp.int32),
        *[pltpu.SemaphoreType.DMA] * 2 * len(flat),
      ],
    ),
    compiler_params=pltpu.CompilerParams(collective_id=_BARRIER, has_side_effects=True),
    interpret=interpret,
  )(jnp.stack([count, received]), *tables, *flat)
  return [
    out.reshape(rows, -1)[:, : math.prod(value.shape[1:])].reshape(
      rows, *value.shape[1:]
    )
    for out, value in zip(outs, values)
  ]


def _send(n_values, copies, rows, axis, numbers_ref, address_ref, source_ref, *refs):
  """One block of addresses; the first waits for all ranks, the last for all rows."""
  value_refs, out_refs = refs[:n_values], refs[n_values : 2 * n_values]
  sent_ref, *semaphores = refs[2 * n_values :]
  left, arrived = semaphores[:n_values], semaphores[n_values:]
  count, received = numbers_ref[0], numbers_ref[1]
  step = pl.program_id(0)

  def copies_of(source, row, peer):
    return [
      pltpu.make_async_remote_copy(
        value_ref.at[source],
        out_ref.at[row],
        send_sem,
        recv_sem,
        device_id={axis: peer},
      )
      for value_ref, out_ref, send_sem, recv_sem in zip(
        value_refs, out_refs, left, arrived
      )
    ]

  @pl.when(step == 0)
  def meet():
    sent_ref[0] = 0
    barrier, ranks = pltpu.get_barrier_semaphore(), lax.axis_size(axis)

    @pl.loop(0, ranks)
    def tell(peer):
      pl.semaphore_signal(barrier, device_id={axis: peer})

    pl.semaphore_wait(barrier, ranks)

  @pl.loop(0, jnp.clip(count * copies - step * _BLOCK, 0, _BLOCK))
  def each_address(i):
    address = address_ref[i]

    @pl.when(address >= 0)
    def start():
      for copy in copies_of(
        source_ref[i], lax.rem(address, rows), lax.div(address, rows)
      ):
        copy.start()
      sent_ref[0] += 1

  @pl.when(step == pl.num_programs(0) - 1)
  def finish():
    one_row = copies_of(0, 0, lax.axis_index(axis))  # only its size counts

    @pl.loop(0, sent_ref[0])
    def wait_sent(_):
      for copy in one_row:
        copy.wait_send()

    @pl.loop(0, received)
    def wait_received(_):
      for copy in one_row:
        copy.wait_recv()


def _in_vectors(value: jax.Array) -> jax.Array:
  """[M, vectors, 128], so that a row is a run of whole vectors."""
  flat = value.reshape(value.shape[0], -1)
  flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % _LANES)))
  return flat.reshape(value.shape[0], -1, _LANES)
