"""Grouped FP8 and masked products: every implementation against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import grouped_matmul as gm
from kernels_pallas.choose import target_platform
from kernels_pallas.fp8_matmul.persistent import Tiling
from kernels_pallas.grouped_matmul import gpu, gpu_fp8, schedule, tpu, tpu_fp8
from tests import tpu_topology
from tests.kernels_pallas import fp8_matmul_oracle as oracle


def on(platform):
  return pytest.mark.skipif(target_platform() != platform, reason=f"not on {platform}")


GPU = pytest.param("gpu", marks=[pytest.mark.gpu, on("gpu")])
IMPLS = ["reference", "blocks", GPU, pytest.param("tpu", marks=on("tpu"))]
# Groups in units of 128 rows and the padding after them; all have one shape.
LAYOUTS = {
  "ragged": ([1, 2, 1, 1], 0),
  "empty groups": ([0, 3, 0, 1], 1),
  "one group holds all": ([0, 0, 5, 0], 0),
  "only padding": ([0, 0, 0, 0], 5),
}
N, K = 192, 320


def inputs(units, padding, n=N, k=K, seed=0):
  """Quantised rows and matrices; in the padding codes and scales are NaN."""
  rng = np.random.default_rng(seed)
  sizes = np.array(units, np.int32) * 128
  used = int(sizes.sum())
  a, sa = oracle.quantize_tiles(rng.normal(size=(used + padding * 128, k)))
  matrices = [oracle.quantize_blocks(rng.normal(size=(n, k))) for _ in units]
  b, sb = (jnp.stack(parts) for parts in zip(*matrices))
  a, sa = a.at[used:].set(jnp.nan), sa.at[:, used:].set(jnp.nan)
  return a, sa, b, sb, jnp.asarray(sizes)


def token_inputs(units, padding, i=N, j=K, seed=0):
  rng = np.random.default_rng(seed)
  sizes = np.array(units, np.int32) * 128
  used, rows = int(sizes.sum()), int(sizes.sum()) + padding * 128
  out = []
  for size in (i, j):
    codes, scales = oracle.quantize_tiles(rng.normal(size=(size, rows)))
    out += [codes.at[:, used:].set(jnp.nan), scales.at[used // 128 :].set(jnp.nan)]
  return *out, jnp.asarray(sizes)


def assert_grouped(got, a, sa, b, sb, sizes, impl):
  used = int(sizes.sum())
  assert (np.asarray(got[used:], np.float32) == 0).all()
  a, start = oracle.dequantize_tiles(a, sa), 0
  for e, size in enumerate(np.asarray(sizes)):
    rows, b_NK = slice(start, start + size), oracle.dequantize_blocks(b[e], sb[e])
    want, magnitude = a[rows] @ b_NK.T, abs(a[rows]) @ abs(b_NK).T
    oracle.assert_close(got[rows], want, magnitude, got.dtype, impl)
    start += size


def assert_grouped_dw(got, a, sa, b, sb, sizes, impl, c=None):
  a, b = oracle.dequantize_tiles(a, sa), oracle.dequantize_tiles(b, sb)
  start = 0
  for e, size in enumerate(np.asarray(sizes)):
    rows, add = slice(start, start + size), np.float32(0) if c is None else c[e]
    want = a[:, rows] @ b[:, rows].T + add
    magnitude = abs(a[:, rows]) @ abs(b[:, rows]).T + abs(add)
    oracle.assert_close(got[e], want, magnitude, jnp.float32, impl)
    start += size


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_values(impl, layout, dtype):
  args = inputs(*LAYOUTS[layout])
  got = gm.grouped_fp8_matmul(*args, out_dtype=dtype, impl=impl)
  assert got.dtype == dtype
  assert_grouped(got, *args, impl)


@pytest.mark.parametrize("add", [False, True], ids=["alone", "added"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_weight_gradients(impl, layout, add):
  args = token_inputs(*LAYOUTS[layout])
  c = np.random.default_rng(1).normal(size=(4, N, K)).astype(np.float32) * 100
  got = gm.grouped_fp8_matmul_dw(*args, jnp.asarray(c) if add else None, impl=impl)
  assert_grouped_dw(got, *args, impl, c if add else None)


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_256_uneven_groups(impl):
  units = np.random.default_rng(0).integers(0, 3, 256) * (np.arange(256) % 8 == 3)
  args = inputs(units, 1, n=64, k=128)
  assert_grouped(gm.grouped_fp8_matmul(*args, impl=impl), *args, impl)


@pytest.mark.gpu
@on("gpu")
@pytest.mark.parametrize(
  "tiling",
  [
    Tiling(128, 4),
    Tiling(192, 4),
    Tiling(128, 4, warpgroups=3),
    Tiling(128, 4, warpgroups=3, cluster=2),
  ],
  ids=str,
)
def test_tilings(tiling):
  for k in (640, 1024):  # the second in whole rounds of the ring
    args = inputs([0, 3, 0, 1], 1, n=320, k=k)
    assert_grouped(gpu_fp8.multiply(*args, tiling=tiling), *args, "gpu")
  args = token_inputs([0, 3, 2, 1], 1, i=320, j=576)
  assert_grouped_dw(gpu_fp8.multiply_rows(*args, tiling=tiling), *args, "gpu")


@pytest.mark.gpu
@on("gpu")
@pytest.mark.parametrize(
  "tiling",
  [
    Tiling(64, 7),
    Tiling(128, 5),
    Tiling(192, 4),
    Tiling(256, 4, fresh=128),
    Tiling(128, 4, warpgroups=3),
  ],
  ids=str,
)
def test_tiles_in_quick_succession(tiling):
  """Many tiles on few multiprocessors, those of padding ready at once: none is torn."""
  a, sa, b, sb, sizes = inputs([5, 0, 9, 2], 48, n=768, k=128)
  run = functools.partial(gpu_fp8.multiply, a, sa, b, sb, sizes, tiling=tiling)
  for _ in range(4):
    assert_grouped(run(num_sms=4), a, sa, b, sb, sizes, "gpu")


def masked_inputs(counts, capacity, n=N, k=K):
  rng = np.random.default_rng(0)
  groups = [
    (*oracle.quantize_tiles(rng.normal(size=(capacity, k))), count) for count in counts
  ]
  codes = jnp.stack([a.at[count:].set(jnp.nan) for a, _, count in groups])
  scales = jnp.stack([sa.at[:, count:].set(jnp.nan) for _, sa, count in groups], 1)
  matrices = [oracle.quantize_blocks(rng.normal(size=(n, k))) for _ in counts]
  b, sb = (jnp.stack(parts) for parts in zip(*matrices))
  return codes, scales, b, sb, jnp.asarray(counts, jnp.int32)


def assert_masked(got, a, sa, b, sb, counts, impl):
  for g, count in enumerate(np.asarray(counts)):
    assert (np.asarray(got[g, count:]) == 0).all()
    a_CK = oracle.dequantize_tiles(a[g], sa[:, g])[:count]
    b_NK = oracle.dequantize_blocks(b[g], sb[g])
    want, magnitude = a_CK @ b_NK.T, abs(a_CK) @ abs(b_NK).T
    oracle.assert_close(got[g, :count], want, magnitude, jnp.float32, impl)


@pytest.mark.parametrize("capacity", [16, 200])
@pytest.mark.parametrize("impl", IMPLS)
def test_masked_fp8(impl, capacity):
  args = masked_inputs([0, 1, 16, capacity, 9], capacity)
  got = gm.masked_fp8_matmul(*args, out_dtype=jnp.float32, impl=impl)
  assert_masked(got, *args, impl)


@pytest.mark.parametrize("capacity", [16, 200])
@pytest.mark.parametrize("impl", IMPLS)
def test_masked_bf16(impl, capacity):
  f = 256 if impl == "tpu" else 192
  check_masked_bf16(functools.partial(gm.masked_matmul, impl=impl), capacity, f)


def check_masked_bf16(multiply, capacity, f):
  rng, counts = np.random.default_rng(0), np.array([0, 1, 16, capacity, 9])
  x = jnp.asarray(rng.normal(size=(5, capacity, 256)), jnp.bfloat16)
  w = jnp.asarray(rng.normal(size=(5, 256, f)), jnp.bfloat16)
  own = np.arange(capacity) < counts[:, None]
  poisoned = jnp.where(own[:, :, None], x, jnp.nan)
  got = multiply(poisoned, w, jnp.asarray(counts))
  x, w = np.where(own[:, :, None], np.asarray(x, np.float64), 0), np.asarray(w)
  want, magnitude = x @ w.astype(np.float64), abs(x) @ abs(w.astype(np.float64))
  assert (np.asarray(got, np.float64)[~own] == 0).all()
  oracle.assert_close(got, want, magnitude, jnp.bfloat16, "reference")


@pytest.mark.parametrize("impl", ["reference", "blocks", GPU])
def test_bf16_weight_gradient_is_added(impl):
  rng, sizes = np.random.default_rng(0), jnp.array([128, 0, 256], jnp.int32)
  x = jnp.asarray(rng.normal(size=(512, 128)), jnp.bfloat16)
  dy = jnp.asarray(rng.normal(size=(512, 192)), jnp.bfloat16)
  c = jnp.asarray(rng.normal(size=(3, 128, 192)), jnp.float32)
  alone = gm.grouped_matmul_dw(x, dy, sizes, impl=impl)
  added = gm.grouped_matmul_dw(x, dy, sizes, c, num_sms=8, impl=impl)
  np.testing.assert_allclose(added, alone + c, atol=1e-5)  # one FP32 rounding of ~64
  with pytest.raises(ValueError, match=r"c_EDF float32\[3, 128, 192\]"):
    gm.grouped_matmul_dw(x, dy, sizes, c[:2], impl=impl)


@pytest.mark.parametrize("warpgroups", [2, 3])
@on("cpu")
def test_gpu_kernels_interpreted(warpgroups):
  interpret, tiling = (
    plgpu.InterpretGPUParams(),
    Tiling(stages=2, warpgroups=warpgroups),
  )
  args = inputs([0, 1, 0, 2], 1, n=128, k=192)
  got = gpu_fp8.multiply(*args, tiling=tiling, interpret=interpret)
  assert_grouped(got, *args, "interpreted")
  args = token_inputs([0, 1, 1, 0], 1, i=64, j=128)
  got = gpu_fp8.multiply_rows(*args, tiling=tiling, interpret=interpret)
  assert_grouped_dw(got, *args, "interpreted")


@pytest.mark.parametrize("rows", [1408, 1153, 1300])
def test_tall_blocks(rows):
  """Each 64 rows once, those of no group too; none across groups, and none of 64."""
  sizes = np.array([0, 128, 640, 0, 384])
  table = np.asarray(schedule.tall(jnp.asarray(sizes), rows))
  rest = 2 * -(-(rows - sizes.sum()) // 128)
  owner = np.repeat([*range(5), 5], [*sizes // 64, rest])
  seen = []
  for group, first, busy in table.T:
    assert busy in (2, 3) or (group, first, busy) == (5, 0, 0)
    seen += range(first, first + busy)
    assert (owner[first : first + busy] == group).all()
  assert seen == list(range(len(owner)))


@on("cpu")
def test_masked_gpu_kernel_interpreted():
  *quantized, counts = masked_inputs([0, 5], 16, n=64, k=128)
  got = gpu_fp8.multiply_masked(
    *quantized,
    counts,
    tiling=Tiling(64, 2),
    interpret=plgpu.InterpretGPUParams(),
  )
  want = gm.masked_fp8_matmul(*quantized, counts, impl="reference")
  np.testing.assert_allclose(
    np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=2**-7, atol=1e-3
  )


@on("cpu")
def test_tpu_kernels_interpreted():
  args = inputs([0, 1, 0, 2], 1)
  assert_grouped(tpu_fp8.multiply(*args, interpret=True), *args, "tpu")
  args, c = token_inputs([0, 2, 1, 0], 1), np.ones((4, N, K), np.float32)
  got = tpu_fp8.multiply_rows(*args, jnp.asarray(c), interpret=True)
  assert_grouped_dw(got, *args, "tpu", c)


@on("cpu")
def test_masked_tpu_kernels_interpreted():
  """Several tiles of rows, tiles of none, and a capacity that is no whole tile."""
  args = masked_inputs([0, 130, 9], 200)
  got = tpu_fp8.multiply_masked(*args, out_dtype=jnp.float32, interpret=True)
  assert_masked(got, *args, "tpu")
  multiply = functools.partial(tpu.multiply_masked, interpret=True)
  check_masked_bf16(multiply, 300, 384)


def specs(experts, rows, n, k):
  """Arguments of the forward product and of the weight gradient."""
  e4m3, n_, k_, r_ = jnp.float8_e4m3fn, *(oracle.blocks(s) for s in (n, k, rows))
  shapes = [
    [((rows, k), e4m3), ((k_, rows), None), ((experts, n, k), e4m3)],
    [((n, rows), e4m3), ((r_, n), None), ((k, rows), e4m3), ((r_, k), None)],
  ]
  shapes[0].append(((experts, n_, k_), None))
  sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
  return [
    [*(jax.ShapeDtypeStruct(s, d or jnp.float32) for s, d in group), sizes]
    for group in shapes
  ]


@pytest.mark.parametrize("shape", [(8, 32768, 4096, 7168), (256, 65536, 7168, 2048)])
def test_gpu_kernels_lower_for_cuda(shape):
  forward, tokens = specs(*shape)
  for function, args in ((gpu_fp8.multiply, forward), (gpu_fp8.multiply_rows, tokens)):
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_masked_gpu_kernels_lower_for_cuda():
  experts, capacity, n, k = 16, 192, 4096, 7168
  (_, _, b, sb, counts), _ = specs(experts, 128, n, k)
  a = jax.ShapeDtypeStruct((experts, capacity, k), jnp.float8_e4m3fn)
  sa = jax.ShapeDtypeStruct((k // 128, experts, capacity), jnp.float32)
  traced = jax.jit(gpu_fp8.multiply_masked).trace(a, sa, b, sb, counts)
  assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
  x = jax.ShapeDtypeStruct(a.shape, jnp.bfloat16)
  w = jax.ShapeDtypeStruct((experts, k, n), jnp.bfloat16)
  traced = jax.jit(gpu.multiply_masked).trace(x, w, counts)
  assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "tpu7x:2x2x1"])
def test_compiles_for_tpu_topologies(topology):
  devices = tpu_topology.devices(topology)
  mesh = Mesh(np.array(devices[:1]), ("one",))

  def step(forward, tokens, x, w):
    a, sa, b, sb, counts = forward
    masked = a.reshape(8, 512, -1), sa.reshape(-1, 8, 512), b, sb, counts
    return (
      gm.grouped_fp8_matmul(*forward),
      gm.grouped_fp8_matmul_dw(*tokens),
      gm.masked_fp8_matmul(*masked),
      gm.masked_matmul(x, w, counts),
    )

  bf16 = [((8, 512, 1408), jnp.bfloat16), ((8, 1408, 2048), jnp.bfloat16)]
  args = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, P())),
    [*specs(8, 4096, 2048, 1408), *(jax.ShapeDtypeStruct(*shape) for shape in bf16)],
  )
  local = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
  compiled = jax.jit(local).lower(*args).compile()
  assert compiled.as_text().count("tpu_custom_call") >= 4


def test_refusals():
  a, sa, b, sb, sizes = inputs([1, 1], 0)
  with pytest.raises(ValueError, match="2 integer group sizes"):
    gm.grouped_fp8_matmul(a, sa, b, sb, sizes[:1])
  with pytest.raises(ValueError, match="a_ZK float8_e4m3fn"):
    gm.grouped_fp8_matmul(a.astype(jnp.float32), sa, b, sb, sizes)
  with pytest.raises(ValueError, match="impl='nosuch' is unknown"):
    gm.grouped_fp8_matmul(a, sa, b, sb, sizes, impl="nosuch")
  with pytest.raises(ValueError, match=r"masked_matmul needs x \[G, C, D\]"):
    gm.masked_matmul(jnp.ones((2, 8, 64)), jnp.ones((2, 32, 64)), sizes)
  assert "capacity that is a multiple of 8, got 12" in gpu_fp8.unsupported(64, 64, 12)
