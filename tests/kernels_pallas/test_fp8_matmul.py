"""One suite over every implementation that runs here, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import fp8_matmul as op
from kernels_pallas.choose import target_platform
from kernels_pallas.fp8_matmul import gpu, reference, tilings, tpu
from kernels_pallas.fp8_matmul.persistent import Tiling
from tests import tpu_topology
from tests.kernels_pallas import fp8_matmul_oracle as oracle


def on(platform):
  return pytest.mark.skipif(target_platform() != platform, reason=f"not on {platform}")


IMPLS = [
  "reference",
  pytest.param("gpu", marks=[pytest.mark.gpu, on("gpu")]),
  pytest.param("tpu", marks=on("tpu")),
]
# M, N, K: one row, ragged rows, ragged last blocks of N and K; few rows of a K that
# thread blocks split, also unevenly.
SHAPES = [
  (1, 128, 256),
  (257, 320, 576),
  (4095, 192, 128),
  (9, 192, 4224),
  (70, 64, 8192),
]
# On the GPU also every tiling of the table and some that it does not have, at shapes
# ragged for all.
TILINGS = [
  *tilings.known(64),
  *tilings.known(128),
  *tilings.known(4096),
  Tiling(),
  Tiling(columns=64, stages=7),
  Tiling(columns=32, stages=8),
  Tiling(stages=4, warpgroups=3),
  Tiling(64, 7, together=3),
  Tiling(16, 16, warpgroups=1, together=8, fetched=4),
  Tiling(32, 12, warpgroups=1, together=4, fetched=2, split=2),
  Tiling(64, 12, warpgroups=1, together=4, split=4),
  Tiling(32, 12, warpgroups=1, together=4, fetched=2, split=2, own_last=2),
  Tiling(64, 12, warpgroups=1, together=4, split=4, own_last=1),
  Tiling(128, 4, split=2),
]
TILINGS = list(dict.fromkeys(TILINGS))
# V3's (N, K), every one lowered.
V3_SHAPES = [
  (2112, 7168),
  (24576, 1536),
  (32768, 512),
  (7168, 16384),
  (4096, 7168),
  (7168, 2048),
]


def inputs(m, n, k, seed=0):
  rng = np.random.default_rng(seed)
  x, w = rng.normal(size=(m, k)), rng.normal(size=(n, k))
  return x, w, *oracle.quantize_tiles(x), *oracle.quantize_blocks(w)


def token_inputs(i, j, m, seed=0):
  rng = np.random.default_rng(seed)
  x, y = rng.normal(size=(i, m)), rng.normal(size=(j, m))
  return *oracle.quantize_tiles(x), *oracle.quantize_tiles(y)


def assert_product(got, a, sa, b, sb, impl, add=0.0, weights=True):
  dequantize = oracle.dequantize_blocks if weights else oracle.dequantize_tiles
  a, b = oracle.dequantize_tiles(a, sa), dequantize(b, sb)
  want, magnitude = a @ b.T + add, abs(a) @ abs(b).T + abs(add)
  oracle.assert_close(got, want, magnitude, got.dtype, impl)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_values(impl, shape, dtype):
  x, w, *quantized = inputs(*shape)
  got = op.fp8_matmul(*quantized, out_dtype=dtype, impl=impl)
  assert got.dtype == dtype
  assert_product(got, *quantized, impl)
  assert oracle.calc_diff(got, x @ w.T) < 1e-3


@pytest.mark.parametrize("tokens", [200, 384, 4095])
@pytest.mark.parametrize("add", [False, True], ids=["alone", "added"])
@pytest.mark.parametrize("impl", IMPLS)
def test_weight_gradients(impl, add, tokens):
  quantized = token_inputs(192, 320, tokens)
  c = np.random.default_rng(1).normal(size=(192, 320)).astype(np.float32) * 100
  got = op.fp8_matmul_dw(*quantized, jnp.asarray(c) if add else None, impl=impl)
  assert got.dtype == jnp.float32
  assert_product(got, *quantized, impl, c if add else np.float32(0), weights=False)


@pytest.mark.gpu
@on("gpu")
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_tilings(tiling):
  # Steps: 3, 9, and 8, which are whole rounds of 4 slots. 576 and 448 columns leave one
  # thread block of a cluster's last pair without a tile.
  for shape in [(1, 192, 320), (300, 576, 1152), (400, 448, 1024)]:
    _, _, a, sa, b, sb = inputs(*shape)
    got = gpu.multiply(a, sa, b[None], sb[None], out_dtype=jnp.float32, tiling=tiling)
    assert_product(got, a, sa, b, sb, "gpu")
  if tiling.columns in (128, 192) and not tiling.fresh and tiling.split == 1:
    for tokens in (640, 1024):
      quantized = token_inputs(320, 576, tokens)
      got = gpu.multiply_tokens(*quantized, tiling=tiling)[0]
      assert_product(got, *quantized, "gpu", weights=False)


@pytest.mark.gpu
@on("gpu")
def test_few_multiprocessors():
  _, _, *quantized = inputs(1000, 576, 512)
  everything = op.fp8_matmul(*quantized, impl="gpu")
  few = op.fp8_matmul(*quantized, num_sms=6, impl="gpu")
  np.testing.assert_array_equal(
    np.asarray(everything, np.float32), np.asarray(few, np.float32)
  )


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_do_not_mix(impl):
  """A row of NaN codes stays alone."""
  _, _, a, sa, b, sb = inputs(200, 128, 256)
  clean = np.asarray(op.fp8_matmul(a, sa, b, sb, impl=impl), np.float32)
  got = op.fp8_matmul(a.at[77].set(jnp.nan), sa, b, sb, impl=impl)
  got = np.asarray(got, np.float32)
  assert np.isnan(got[77]).all()
  np.testing.assert_array_equal(np.delete(got, 77, 0), np.delete(clean, 77, 0))


def test_accumulation_in_14_bits_is_what_the_paper_measures():
  """About 2% at worst at K = 4096 without promotion; a tenth of it with (3.3.2)."""
  rng = np.random.default_rng(0)
  a, b = (jnp.asarray(rng.normal(size=(64, 4096)), jnp.float32) for _ in range(2))
  exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
  typical = np.sqrt((exact**2).mean())

  def worst(**options):
    got = np.asarray(reference.multiply_14_bit(a, b, **options), np.float64)
    return abs(got - exact).max() / typical

  assert 0.015 < worst() < 0.025
  assert worst(promote_every=128) < 0.0025
  assert worst(promote_every=128, bits=24) < 1e-5
  assert worst(promote_every=128, align_products=False) < worst(align_products=False)


@on("cpu")
@pytest.mark.parametrize(
  ("shape", "tiling"),
  [
    ((130, 192, 320), Tiling(256, 2, fresh=128)),
    ((60, 48, 640), Tiling(16, 3, 1, warpgroups=1, together=2)),
    ((60, 48, 704), Tiling(16, 4, 1, warpgroups=1, together=4, fetched=2)),
    ((320, 64, 320), Tiling(64, 2, warpgroups=3)),  # a whole tile and lower ones
  ],
  ids=str,
)
def test_gpu_kernel_interpreted(shape, tiling):
  """The kernel's own logic on any machine."""
  _, _, a, sa, b, sb = inputs(*shape)
  interpret = plgpu.InterpretGPUParams()
  got = gpu.multiply(
    a, sa, b[None], sb[None], out_dtype=jnp.float32, tiling=tiling, interpret=interpret
  )
  assert_product(got, a, sa, b, sb, "interpreted")


@on("cpu")
def test_gpu_weight_gradient_interpreted():
  quantized = token_inputs(256, 128, 200)  # a whole tile and a lower one
  interpret = plgpu.InterpretGPUParams()
  got = gpu.multiply_tokens(
    *quantized, tiling=Tiling(stages=2, warpgroups=3), interpret=interpret
  )
  assert_product(got[0], *quantized, "interpreted", weights=False)


def spec(shape, dtype=jnp.float8_e4m3fn):
  return jax.ShapeDtypeStruct(shape, dtype)


def forward_specs(m, n, k):
  n_, k_ = oracle.blocks(n), oracle.blocks(k)
  scales = spec((k_, m), jnp.float32), spec((1, n_, k_), jnp.float32)
  return spec((m, k)), scales[0], spec((1, n, k)), scales[1]


def token_specs(i, j, m):
  m_ = oracle.blocks(m)
  return (
    spec((i, m)),
    spec((m_, i), jnp.float32),
    spec((j, m)),
    spec((m_, j), jnp.float32),
  )


@pytest.mark.parametrize("shape", V3_SHAPES, ids=str)
def test_gpu_kernels_lower_for_cuda(shape):
  """Shared memory and layouts fit: forward, dgrad and wgrad, training and decoding."""
  n, k = shape
  cases = [
    (gpu.multiply, forward_specs(4096, n, k)),
    (gpu.multiply, forward_specs(4096, k, n)),
    (gpu.multiply, forward_specs(64, n, k)),
    (gpu.multiply_tokens, token_specs(n, k, 4096)),
  ]
  for function, args in cases:
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_tilings_lower_for_cuda():
  for tiling in TILINGS:
    args = forward_specs(300, 576, 1152)
    traced = jax.jit(lambda *a, t=tiling: gpu.multiply(*a, tiling=t)).trace(*args)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "tpu7x:2x2x1"])
def test_compiles_for_tpu_topologies(topology):
  """Through the public functions: a mesh of TPUs picks the TPU's kernels by itself."""
  devices = tpu_topology.devices(topology)
  mesh = Mesh(np.array(devices[:1]), ("one",))

  def step(a, sa, b, sb, x, sx, y, sy):
    return op.fp8_matmul(a, sa, b[0], sb[0]), op.fp8_matmul_dw(x, sx, y, sy)

  args = [
    jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, P()))
    for s in (*forward_specs(1024, 2112, 7168), *token_specs(2112, 7168, 1024))
  ]
  local = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
  compiled = jax.jit(local).lower(*args).compile()
  assert compiled.as_text().count("tpu_custom_call") >= 2


@on("cpu")
@pytest.mark.parametrize("shape", [(130, 192, 320), (1, 128, 128)], ids=str)
def test_tpu_kernels_interpreted(shape):
  _, _, a, sa, b, sb = inputs(*shape)
  got = tpu.multiply(a, sa, b[None], sb[None], out_dtype=jnp.float32, interpret=True)
  assert_product(got, a, sa, b, sb, "tpu")
  m, n, k = shape
  quantized = token_inputs(n, k, m)
  c = jnp.ones((1, n, k))
  got = tpu.multiply_tokens(*quantized, c_EIJ=c, interpret=True)[0]
  assert_product(got, *quantized, "tpu", np.float32(1), weights=False)


def test_refusals():
  _, _, a, sa, b, sb = inputs(8, 128, 256)
  with pytest.raises(ValueError, match="impl='nosuch' is unknown"):
    op.fp8_matmul(a, sa, b, sb, impl="nosuch")
  for name in {"gpu", "tpu"} - {target_platform()}:
    with pytest.raises(ValueError, match=f"impl='{name}' does not run on platform"):
      op.fp8_matmul(a, sa, b, sb, impl=name)
  with pytest.raises(ValueError, match=r"a_MK float8_e4m3fn\[8, 256\], got bfloat16"):
    op.fp8_matmul(a.astype(jnp.bfloat16), sa, b, sb)
  with pytest.raises(ValueError, match=r"sa_kM float32\[2, 8\], got float32\[8, 2\]"):
    op.fp8_matmul(a, sa.T, b, sb)
  with pytest.raises(ValueError, match=r"c_IJ float32\[8, 128\]"):
    op.fp8_matmul_dw(a, sa, b, jnp.ones((2, 128)), jnp.ones((8, 64)))
  assert "multiples of 64, got N=96, K=128" in gpu.unsupported(96, 128)
  assert gpu.unsupported(2112, 576) is None


def test_default_runs_on_this_platform():
  _, _, *quantized = inputs(5, 128, 256)
  assert_product(op.fp8_matmul(*quantized), *quantized, target_platform())


def test_a_fallback_is_said(monkeypatch):
  _, _, a, sa, b, sb = inputs(8, 32, 256)
  want = op.fp8_matmul(a, sa, b, sb, impl="reference")
  monkeypatch.setattr("kernels_pallas.choose.target_platform", lambda: "gpu")
  with pytest.warns(UserWarning, match="N=32, K=256: pad them; impl='reference'"):
    got = op.fp8_matmul(a, sa, b, sb)
  np.testing.assert_array_equal(got, want)
