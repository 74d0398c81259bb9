"""The kernels' own logic without their hardware: interpreted, lowered, compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import quantize as qz
from kernels_pallas.quantize import gpu, reference, tpu
from tests import tpu_topology
from tests.kernels_pallas import quantize_oracle as oracle
from tests.kernels_pallas.test_quantize import on, poisoned, tricky

E4M3 = jnp.float8_e4m3fn
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


@on("cpu")
def test_gpu_kernel_interpreted():
  """Rows and columns of a shape with ragged edges, and rows that are not valid; enough
  tiles for each of the 4 teams to fill a slot of shared memory again."""
  x = poisoned((448, 320))
  clean = np.where(np.arange(448)[:, None] < 390, x, 0)
  x[390:] = np.nan
  x = jnp.asarray(x, jnp.bfloat16)
  got = gpu.quantize_both(x, False, E4M3, jnp.int32(390), interpret=INTERPRET)
  oracle.assert_same(got, (oracle.rows(clean), oracle.columns(clean)))


@on("cpu")
def test_gpu_blocks_interpreted():
  w = np.stack([poisoned((192, 192)), tricky((192, 192))])
  got = gpu.quantize_blocks(
    jnp.asarray(w, jnp.bfloat16), False, E4M3, num_sms=1, interpret=INTERPRET
  )
  for e in range(2):
    oracle.assert_same(jax.tree.map(lambda a, e=e: a[e], got), oracle.blocks(w[e]))


@on("cpu")
def test_gpu_swiglu_interpreted():
  """Codes of the plain formulas but where FP32's last bits decide; scales to 2^-20,
  and dgate to 2^-20 of its terms' magnitudes, about 500 in all."""
  rng = np.random.default_rng(0)
  h = jnp.asarray(rng.normal(size=(128, 256)) * 3, jnp.bfloat16)
  dy = jnp.asarray(rng.normal(size=(128, 128)), jnp.bfloat16)
  gate = jnp.asarray(rng.uniform(size=128), jnp.float32)
  arguments = {"power_of_two": False, "dtype": E4M3, "rows": jnp.int32(100)}
  kernel, meaning = (
    (
      module.swiglu_quantize(h, gate, True, with_h=True, **arguments, **options),
      module.swiglu_quantize_backward(h, gate, dy, True, None, **arguments, **options),
    )
    for module, options in ((gpu, {"interpret": INTERPRET}), (reference, {}))
  )
  clean = np.where(np.arange(128)[:, None] < 100, h.astype(jnp.float32), 0)
  oracle.assert_same(kernel[0][1], oracle.rows(clean, power_of_two=True))
  got, want = jax.tree.leaves(kernel), jax.tree.leaves(meaning)
  assert len(got) == len(want) == 13
  for g, w in zip(got, want):
    assert (g.shape, g.dtype) == (w.shape, w.dtype)
    g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
    if g.ndim == 2 and g.max() > 1:  # codes
      assert (g != w).mean() < 1e-3
      np.testing.assert_allclose(g, w, rtol=2.0**-3, atol=2.0**-9)
    else:
      np.testing.assert_allclose(g, w, rtol=2.0**-20, atol=1e-3 if g.ndim == 1 else 0)


@on("cpu")
def test_gpu_kernels_that_read_codes_interpreted():
  q_MK, s_kM = oracle.rows(poisoned((192, 192)), dtype=oracle.E5M2)
  plain = q_MK.astype(np.float32) * s_kM.T.repeat(128, 1)[:, :192]
  plain[150:] = 0
  got = gpu.requantize_columns(
    jnp.asarray(q_MK), jnp.asarray(s_kM), True, E4M3, 150, interpret=INTERPRET
  )
  oracle.assert_same(got, oracle.columns(plain, power_of_two=True))
  assert qz._options(gpu, 16) == {"num_sms": 16}
  assert qz._options(reference, 16) == {}
  h = qz.quantize_rows(jnp.asarray(np.random.default_rng(2).normal(size=(64, 256))))
  q_ZF, s_fZ = gpu.swiglu_quantize(h, None, False, False, E4M3, interpret=INTERPRET)
  q_want, s_want = reference.swiglu_quantize(h, None, False, False, E4M3)
  np.testing.assert_allclose(s_fZ, s_want, rtol=2.0**-20)
  assert (np.asarray(q_ZF, np.float32) != np.asarray(q_want, np.float32)).mean() < 1e-3


def many(form, x, q, gate, dy):
  """One of the kernels on rows x [M, 1280], their codes q, gates and gradients dy."""
  return {
    "both": lambda: qz.quantize_both(x, impl="gpu"),
    "blocks": lambda: qz.quantize_blocks(
      x.reshape(-1, 7 * 128, x.shape[1]), impl="gpu"
    ),
    "requantize": lambda: qz.requantize_columns(*q, impl="gpu"),
    "swiglu": lambda: qz.swiglu_quantize(x, gate, with_h=True, impl="gpu"),
    "swiglu of codes": lambda: qz.swiglu_quantize(q, gate, both=True, impl="gpu"),
    "backward": lambda: qz.swiglu_quantize_backward(
      q, gate, dy, with_y=True, impl="gpu"
    ),
  }[form]()


@pytest.mark.gpu
@on("gpu")
@pytest.mark.parametrize(
  "form", ["both", "blocks", "requantize", "swiglu", "swiglu of codes", "backward"]
)
def test_many_tiles_in_quick_succession(form):
  """Thousands of tiles, in which 7 rows of tiles repeat, give what these give alone.

  With 35 or 70 different tiles, and 132 or 264 teams that take turns at them, a slot
  of shared memory never held before what it ought to hold.
  """
  period, repeats, width = 7 * 128, 48, 1280
  rng = np.random.default_rng(7)
  x = jnp.asarray(tricky((period, width), seed=8), jnp.bfloat16)
  x = jnp.clip(x, -1e3, 1e3)
  dy = jnp.asarray(rng.normal(size=(period, width // 2)), jnp.bfloat16)
  gate = jnp.asarray(rng.uniform(size=period), jnp.float32)
  q_MK, s_kM = qz.quantize_rows(x, power_of_two=True)

  def repeat(a, axis=0):
    return jnp.concatenate([a] * repeats, axis)

  f = jax.jit(functools.partial(many, form))
  want = f(x, (q_MK, s_kM), gate, dy)
  many_rows = repeat(x), (repeat(q_MK), repeat(s_kM, 1)), repeat(gate), repeat(dy)
  for _ in range(3):
    for g, w in zip(jax.tree.leaves(f(*many_rows)), jax.tree.leaves(want), strict=True):
      w = repeat(w, next(i for i in range(w.ndim) if g.shape[i] != w.shape[i]))
      if g.ndim == 1:  # dgate, of which XLA adds up the terms
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-2)
      else:
        assert (g == w).all()


@on("cpu")
@pytest.mark.parametrize("power_of_two", [False, True], ids=["fp32", "ue8m0"])
def test_tpu_kernel_interpreted(power_of_two):
  x = poisoned((256, 384))
  clean = np.where(np.arange(256)[:, None] < 130, x, 0)
  got = tpu.quantize_both(jnp.asarray(x), power_of_two, E4M3, 130, interpret=True)
  options = {"power_of_two": power_of_two}
  oracle.assert_same(
    got, (oracle.rows(clean, **options), oracle.columns(clean, **options))
  )


def shaped(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def rows_both_blocks(x, rows):
  return (
    gpu.quantize_rows(x, False, E4M3),
    gpu.quantize_both(x, True, E4M3, rows),
    gpu.quantize_blocks(x, False, E4M3),
  )


def swiglu_both_ways(h, gate, dy, rows):
  return (
    gpu.swiglu_quantize(h, gate, False, False, E4M3, with_h=True),
    gpu.swiglu_quantize(h, None, True, False, E4M3, rows),
    gpu.swiglu_quantize_backward(h, gate, dy, True, None, False, E4M3, rows),
  )


@pytest.mark.parametrize("shape", [(4096, 7168), (8192, 576), (4096, 2112)])
def test_gpu_kernels_lower_for_cuda(shape):
  assert_lowers(rows_both_blocks, shaped(*shape), shaped(dtype=jnp.int32))


def test_gpu_swiglu_lowers_for_cuda():
  Z, F = 32768, 2048
  gate, rows = shaped(Z, dtype=jnp.float32), shaped(dtype=jnp.int32)
  assert_lowers(swiglu_both_ways, shaped(Z, 2 * F), gate, shaped(Z, F), rows)


def test_gpu_kernels_that_read_codes_lower_for_cuda():
  def both(q, s, gate, dy):
    h = q, s
    return (
      gpu.requantize_columns(q, s, True, E4M3),
      gpu.swiglu_quantize(h, gate, True, False, E4M3),
      gpu.swiglu_quantize_backward(h, gate, dy, True, None, False, E4M3),
    )

  codes, scales = shaped(4096, 4096, dtype=E4M3), shaped(32, 4096, dtype=jnp.float32)
  gate = shaped(4096, dtype=jnp.float32)
  assert_lowers(both, codes, scales, gate, shaped(4096, 2048))


def assert_lowers(function, *args):
  lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("@mosaic_gpu") >= 3


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "tpu7x:2x2x1"])
def test_compiles_for_tpu_topologies(topology):
  """Through the public functions: a mesh of TPUs picks what suits it by itself."""
  devices = tpu_topology.devices(topology)
  mesh = Mesh(np.array(devices[:1]), ("one",))
  x = jax.ShapeDtypeStruct((256, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, P()))

  def step(x):
    return (
      qz.quantize_rows(x),
      qz.quantize_both(x, power_of_two=True, rows=250),
      qz.quantize_blocks(x),
      qz.swiglu_quantize(x, both=True),
      qz.unpack_e5m6(*qz.pack_e5m6(x)),
    )

  local = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
  compiled = jax.jit(local).lower(x).compile()
  assert compiled.as_text().count("tpu_custom_call") >= 2


def test_shapes_and_dtypes_that_kernels_refuse():
  unsupported = functools.partial(gpu.unsupported, shaped(128, 256))
  assert unsupported(by_columns=True, halves=True) is None
  assert gpu.unsupported(shaped(8, 64)) is None
  for x, needs, complaint in [
    (shaped(128, 256, dtype=jnp.float32), {}, "takes bfloat16, got float32"),
    (shaped(128, 200), {}, "columns that is a multiple of 64, got 200"),
    (shaped(3, 128), {}, "rows that is a multiple of 8, got 3"),
    (shaped(200, 128), {"by_columns": True}, "rows that is a multiple of 64, got 200"),
    (shaped(0, 128), {}, "needs some elements, got [0, 128]"),
    (shaped(128, 192), {"halves": True}, "F a multiple of 128, got F=96"),
  ]:
    assert complaint in gpu.unsupported(x, **needs)
  assert tpu.unsupported(shaped(128, 256), by_columns=True) is None
  assert "multiples of 128, got [200, 128]" in tpu.unsupported(shaped(200, 128))


def test_division_of_gpu_and_tpu_is_exact_too(monkeypatch):
  """What reference.divide does where the compiler's own quotient is a little off."""
  rng = np.random.default_rng(1)
  x = rng.normal(size=(512, 512)).astype(np.float32)
  x[0, :2] = 0.0, -0.0
  s = np.exp2(rng.uniform(-20, 20, (512, 1))).astype(np.float32)
  want = x / s
  monkeypatch.setattr(reference, "target_platform", lambda: "gpu")
  got = jax.jit(reference.divide)(x, s)
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(np.signbit(got), np.signbit(want))
