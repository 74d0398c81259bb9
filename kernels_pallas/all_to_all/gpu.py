"""All-to-all on NVIDIA Hopper: rows through shared memory into the peer's buffer.

A few thread blocks, one an SM, share the rows out; the other SMs stay free. A block
runs rings of stages in shared memory. Of a ring's two warpgroups, one copies rows in by
bulk copies, the other copies each out, once for each destination, over NVLink, so a
token is read once however many ranks it goes to. There is no packed copy of what is
sent. Rows for the sender itself go the same way through the same remote references;
only in a mesh of one device, for which JAX has none without NVSHMEM, are they plain
references.

When all its rows have landed, each sender signals every rank's semaphore, and each rank
waits for all. Before the kernel starts, XLA lets all devices of the mesh meet on their
streams: until then a peer may still use the memory that is to become its receive
buffer. So every device of the mesh must come to this call, on the axis or not.

Works among GPUs of one process. Rows are padded to whole 16 bytes, which costs a copy
where they are not. NVLink multicast is not used.

Shape suffixes: M entries, A copies of a row, C rows received, W width of a row.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.all_to_all.route import Axis

_SHARED_BYTES = 220 * 1024  # of the 227 KiB that a block can have
_BARRIERS = 32  # that one array of them can hold
_FEWEST_STAGES = 3
_COPY_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Layout:
  """How many SMs send, rings of each, and at most how many rows each ring holds."""

  sms: int = 16
  rings: int = 4
  stages: int = 16

  def fit(self, row_bytes: int) -> "Layout":
    """What shared memory and barriers allow: fewer stages, then fewer rings."""
    rings = max(1, min(self.rings, _SHARED_BYTES // (_FEWEST_STAGES * row_bytes)))
    room = _SHARED_BYTES // (rings * row_bytes)
    stages = min(self.stages, room, _BARRIERS // rings)
    return Layout(self.sms, rings, stages)


def unsupported(values: Sequence[jax.Array]) -> str | None:
  """Why this kernel cannot send such rows, or None when it can."""
  if jax.process_count() > 1:
    return "sends among GPUs of one process"
  row_bytes = sum(_row_bytes(value) for value in values)
  if Layout().fit(row_bytes).stages < _FEWEST_STAGES:
    return f"holds rows in shared memory, {row_bytes} bytes are too wide: split them"
  return None


def send_rows(
  values: Sequence[jax.Array],
  address_MA: jax.Array,
  count: jax.Array,
  received: jax.Array,
  rows: int,
  axis: Axis,
  source_M: jax.Array | None = None,
  num_sms: int | None = None,
  layout: Layout | None = None,
  interpret=None,
) -> list[jax.Array]:
  """As `kernels_pallas.all_to_all.send_rows`; rows that nobody sends to hold anything.

  `layout` is for tuning, `interpret` for tests.
  """
  del received  # the semaphore counts senders, not rows
  flat = [_padded(value) for value in values]
  layout = layout or Layout(sms=num_sms or Layout.sms)
  layout = layout.fit(sum(_row_bytes(value) for value in flat))
  ring_slots = layout.rings * layout.stages
  sources = [] if source_M is None else [source_M]
  run = plgpu.kernel(
    functools.partial(_send, len(flat), layout, rows, axis),
    out_type=[jax.ShapeDtypeStruct((rows, v.shape[1]), v.dtype) for v in flat],
    scratch_types=[
      [plgpu.SMEM((layout.rings, layout.stages, v.shape[1]), v.dtype) for v in flat],
      plgpu.Barrier(num_arrivals=len(flat), num_barriers=ring_slots),
      plgpu.Barrier(num_arrivals=1, num_barriers=ring_slots),
    ],
    grid=(layout.sms,),
    grid_names=("sm",),
    num_threads=2 * layout.rings,
    thread_name="warpgroup",
    interpret=interpret,
  )
  sent = run(*flat, count.reshape(1), address_MA, *sources)
  return [
    out[:, : math.prod(value.shape[1:])].reshape(rows, *value.shape[1:])
    for out, value in zip(sent, values)
  ]


def _send(n_values, layout, rows, axis, *refs):
  """The kernel, as a warpgroup runs it: even ones fill rings, odd ones empty them."""
  value_refs, (count_ref, *table_refs) = refs[:n_values], refs[n_values : -n_values - 3]
  out_refs, (slots, filled, free) = refs[-n_values - 3 : -3], refs[-3:]
  landed = pl.get_global(plgpu.SemaphoreType.REGULAR)
  warpgroup = lax.axis_index("warpgroup")
  ring = lax.div(warpgroup, 2)
  alone = jax.sharding.get_abstract_mesh().size == 1
  senders = layout.sms * layout.rings
  sender = lax.axis_index("sm") * layout.rings + ring
  slots = [slot.at[ring] for slot in slots]
  stages = layout.stages
  lag = stages // 2  # rows on their way out before the oldest must have left its slot

  def barrier(array, step):
    return array.at[ring * stages + lax.rem(step, stages)]

  def fill(step, row, _):
    @pl.when(step >= stages)
    def reuse():
      plgpu.barrier_wait(barrier(free, step))

    for value_ref, slot in zip(value_refs, slots):
      plgpu.copy_gmem_to_smem(
        value_ref.at[row],
        slot.at[lax.rem(step, stages)],
        barrier(filled, step),
        oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
      )

  def empty(step, _, addresses):
    plgpu.barrier_wait(barrier(filled, step))
    for address in addresses:

      @pl.when(address >= 0)
      def copy(address=address):
        peer, row = lax.div(address, rows), lax.rem(address, rows)
        for out_ref, slot in zip(out_refs, slots):
          there = out_ref if alone else plgpu.remote_ref(out_ref, {axis: peer})
          plgpu.copy_smem_to_gmem(
            slot.at[lax.rem(step, stages)], there.at[row], commit_group=False
          )

    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(lag, wait_read_only=True)

    pl.when(step >= lag)(lambda: plgpu.barrier_arrive(barrier(free, step - lag)))

  def walk(visit):
    parts = lax.axis_size(axis)
    return _each_row(table_refs, count_ref[0], sender, senders, parts, visit)

  @pl.when(lax.rem(warpgroup, 2) == 0)
  def copy_in():
    steps = walk(fill)

    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def drain(step):  # every arrival is waited for once
      plgpu.barrier_wait(barrier(free, step))

  @pl.when(lax.rem(warpgroup, 2) == 1)
  def copy_out():
    steps = walk(empty)
    plgpu.wait_smem_to_gmem(0)

    @pl.loop(jnp.maximum(steps - lag, 0), steps)
    def release(step):
      plgpu.barrier_arrive(barrier(free, step))

    ranks = lax.axis_size(axis)

    @pl.loop(0, ranks)
    def signal(peer):
      pl.semaphore_signal(landed, device_id=None if alone else {axis: peer})

    @pl.when(sender == 0)
    def wait():
      pl.semaphore_wait(landed, ranks * senders)


def _each_row(table_refs, count, sender, senders, parts, visit):
  """visit(step, row, addresses) for each row that goes anywhere; returns their number.

  Entries below `count` are cut into parts, one a rank, which a sender takes in turns:
  rows on their way home stand by rank, and all links are to be busy at once. An entry
  is looked up while the one before it is visited.
  """
  address_ref, *source_ref = table_refs
  entries, copies = address_ref.shape
  part_size = lax.div(count + parts - 1, parts)

  def look_up(i):
    part = lax.rem(i + sender, parts)
    within = sender + lax.div(i, parts) * senders
    entry = part * part_size + within
    mine = (within < part_size) & (entry < count)
    entry = jnp.minimum(entry, entries - 1)
    row = source_ref[0][entry] if source_ref else entry
    addresses = (address_ref[entry, a] for a in range(copies))
    return row, tuple(jnp.where(mine, address, -1) for address in addresses)

  def visit_row(i, carry):
    step, row, addresses = carry
    following = look_up(i + 1)
    needed = functools.reduce(jnp.maximum, addresses) >= 0
    pl.when(needed)(lambda: visit(step, row, addresses))
    return step + needed.astype(jnp.int32), *following

  n = parts * lax.div(jnp.maximum(part_size - sender, 0) + senders - 1, senders)
  first = (jnp.int32(0), *look_up(jnp.int32(0)))
  return lax.fori_loop(0, n, visit_row, first)[0]


def _padded(value: jax.Array) -> jax.Array:
  """[rows, W] of whole 16 bytes."""
  flat = value.reshape(value.shape[0], -1)
  padding = -flat.shape[1] % (_COPY_BYTES // flat.dtype.itemsize)
  return jnp.pad(flat, ((0, 0), (0, padding))) if padding else flat


def _row_bytes(value: jax.Array) -> int:
  width = value.size // value.shape[0] * value.dtype.itemsize
  return -(-width // _COPY_BYTES) * _COPY_BYTES
