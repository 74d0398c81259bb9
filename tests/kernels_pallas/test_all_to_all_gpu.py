"""The GPU's all-to-all on a machine without one: its rings, its lowering, its limits.

Values over real GPUs are tests/kernels_pallas/test_all_to_all.py's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas import all_to_all as a2a
from kernels_pallas.all_to_all import gpu
from kernels_pallas.choose import target_platform

AXIS = "expert"
off_gpu = pytest.mark.skipif(target_platform() == "gpu", reason="runs there for real")


def mesh_of(ranks):
  return Mesh(np.array(jax.devices()[:ranks]), (AXIS,))


@pytest.fixture
def one_rank(monkeypatch):
  """One rank, which waits for nobody: interpret mode has no semaphores."""
  monkeypatch.setattr(pl, "get_global", lambda what: None)
  monkeypatch.setattr(pl, "semaphore_signal", lambda *args, **kwargs: None)
  monkeypatch.setattr(pl, "semaphore_wait", lambda *args: None)


@off_gpu
@pytest.mark.parametrize(
  ("tokens", "count", "copies", "layout"),
  [
    (37, 31, 1, gpu.Layout(sms=2, rings=2, stages=3)),  # slots used again and again
    (9, 9, 3, gpu.Layout(sms=1, rings=1, stages=4)),  # a row to several places
    (5, 2, 2, gpu.Layout(sms=3, rings=2, stages=3)),  # more senders than rows
    (4, 0, 1, gpu.Layout(sms=1, rings=2, stages=3)),  # nothing to send
  ],
  ids=["reuse", "copies", "idle senders", "nothing"],
)
def test_rings_interpreted(one_rank, tokens, count, copies, layout):
  rng, rows = np.random.default_rng(0), 3 * tokens
  values = [
    jnp.asarray(rng.normal(size=(tokens, width)), dtype)
    for width, dtype in ((128, jnp.float32), (6, jnp.bfloat16))
  ]
  address = rng.permutation(rows)[: tokens * copies].reshape(tokens, copies)
  address[rng.uniform(size=address.shape) < 0.3] = -1
  send = functools.partial(
    gpu.send_rows,
    count=jnp.int32(count),
    received=jnp.int32(0),
    rows=rows,
    axis=AXIS,
    layout=layout,
    interpret=plgpu.InterpretGPUParams(detect_races=True),
  )

  def run(values, address, source_M=None):
    body = functools.partial(send, source_M=source_M)
    return jax.shard_map(
      body, mesh=mesh_of(1), in_specs=P(), out_specs=P(), check_vma=False
    )(values, address)

  address = jnp.asarray(address, jnp.int32)
  source = np.asarray(rng.integers(0, tokens, size=tokens), np.int32)
  plain = jax.jit(run)(values, address)
  indirect = jax.jit(functools.partial(run, source_M=source))(values, address)
  for outs, rows_of in ((plain, np.arange(tokens)), (indirect, source)):
    for out, value in zip(outs, values):
      for m in range(count):
        for row in address[m][address[m] >= 0]:
          np.testing.assert_array_equal(out[row], value[rows_of[m]])


@pytest.mark.parametrize(
  ("count", "senders", "parts"),
  [(11, 2, 1), (17, 3, 2), (40, 4, 8), (3, 5, 2), (0, 2, 2)],
)
def test_senders_share_entries_out(count, senders, parts):
  """Each entry below the count once, and each sender begins with another part."""
  addresses = jnp.arange(48, dtype=jnp.int32).reshape(48, 1)
  visited, first = [], []
  with jax.disable_jit():
    for sender in range(senders):
      rows = []
      steps = gpu._each_row(
        [addresses],
        jnp.int32(count),
        jnp.int32(sender),
        senders,
        parts,
        lambda step, row, addresses, rows=rows: rows.append((int(step), int(row))),
      )
      assert [step for step, _ in rows] == list(range(int(steps)))
      visited += [row for _, row in rows]
      first += [row // -(-count // parts) for _, row in rows[:1]]
  assert sorted(visited) == list(range(count))
  if count >= senders * parts:
    assert first == [sender % parts for sender in range(senders)]


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_lowers_for_cuda(ranks):
  """Dispatch in FP8 with scales and combine in BF16 at V3's width."""
  if ranks > len(jax.devices()):
    pytest.skip("needs as many devices, of any kind")
  tokens, width = 64, 7168

  def both(codes, scales, y, experts):
    route = a2a.plan_ranks(experts // (256 // ranks), ranks * tokens, AXIS)
    sent = gpu.send_rows(
      [codes, scales],
      route.address_MA,
      jnp.int32(tokens),
      route.counts_L.sum(),
      route.rows,
      AXIS,
    )
    home = gpu.send_rows(
      [y],
      route.return_R[:, None],
      route.counts_L.sum(),
      jnp.int32(0),
      route.home_rows,
      AXIS,
    )
    return sent, home

  run = jax.shard_map(
    both, mesh=mesh_of(ranks), in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False
  )
  shapes = [
    ((tokens, width), jnp.float8_e4m3fn),
    ((tokens, width // 128), jnp.float32),
    ((ranks * tokens, width), jnp.bfloat16),
    ((tokens, 8), jnp.int32),
  ]
  args = [jax.ShapeDtypeStruct((ranks * s[0], s[1]), dtype) for s, dtype in shapes]
  text = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("mosaic_gpu_v2") >= 2
  assert ("uses_xla_collective_metadata = true" in text) == (ranks > 1)
  assert "nvshmem" not in text


def test_rows_that_the_kernel_refuses():
  def rows(width, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((4, width), dtype)

  assert gpu.unsupported([rows(7168, jnp.float8_e4m3fn), rows(56), rows(3)]) is None
  assert gpu.unsupported([rows(7168, jnp.bfloat16)]) is None
  assert gpu.unsupported([rows(7168)]) is None
  assert "too wide" in str(gpu.unsupported([rows(3 * 7168)]))


@pytest.mark.parametrize("row_bytes", [16, 7168 + 224, 14336, 28672, 70000])
def test_rings_fit_shared_memory(row_bytes):
  fitted = gpu.Layout().fit(row_bytes)
  assert fitted.rings * fitted.stages * row_bytes <= 227 * 1024
  assert fitted.rings * fitted.stages <= 32
  assert fitted.stages >= 3
  assert fitted.sms == gpu.Layout().sms
