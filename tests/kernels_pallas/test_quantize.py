"""One suite over every implementation that runs here, against NumPy, bit by bit."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas import quantize as qz
from kernels_pallas.choose import target_platform
from tests.kernels_pallas import quantize_oracle as oracle


def on(platform):
  return pytest.mark.skipif(target_platform() != platform, reason=f"not on {platform}")


GPU = pytest.param("gpu", marks=[pytest.mark.gpu, on("gpu")])
IMPLS = ["reference", GPU, pytest.param("tpu", marks=on("tpu"))]
SHAPES = {
  "reference": [(256, 384), (200, 576), (1, 128), (129, 40)],
  "gpu": [(256, 384), (192, 576), (64, 64)],
  "tpu": [(256, 384), (128, 512)],
}


def tricky(shape, seed=0):
  """Normal values over 60 binades a tile's rows, with tiles that are hard to scale."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=shape).astype(np.float32)
  x *= np.exp2(rng.integers(-20, 20, (shape[0], 1))).astype(np.float32)
  x[0] = 0
  x.flat[::97] *= 1e-3
  x.flat[::101] = 0
  return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def powers_of_two(shape):
  """Tiles whose largest magnitude is 448 times a power of two, exactly."""
  rng = np.random.default_rng(1)
  x = rng.uniform(-1, 1, shape)
  return (448 * np.exp2(np.floor(rng.uniform(-9, 9, shape))) * np.sign(x)).astype(
    np.float32
  )


def poisoned(shape):
  x = tricky(shape)
  x[0, 0], x[shape[0] // 2, -1] = np.nan, np.inf
  return x


FUNCTIONS = {
  "rows": (qz.quantize_rows, oracle.rows),
  "columns": (qz.quantize_columns, oracle.columns),
  "both": (
    qz.quantize_both,
    lambda x, **o: (oracle.rows(x, **o), oracle.columns(x, **o)),
  ),
  "blocks": (qz.quantize_blocks, oracle.blocks),
}
CONTENTS = {"tricky": tricky, "powers": powers_of_two, "poisoned": poisoned}


@functools.cache
def compiled(function, impl, **options):
  return jax.jit(functools.partial(function, impl=impl, **options))


def run(function, impl, x, *args, **options):
  """The compiled function; x, which BF16 holds exactly, is given in a fitting dtype."""
  if impl == "tpu" and function is qz.quantize_blocks:
    pytest.skip("blocks are left to XLA on TPU")
  if impl == "gpu":
    x = jnp.asarray(x, jnp.bfloat16)
  return compiled(function, impl, **options)(x, *args)


@pytest.mark.parametrize("power_of_two", [False, True], ids=["fp32", "ue8m0"])
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("form", FUNCTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_bits(impl, form, content, power_of_two):
  function, want = FUNCTIONS[form]
  for shape in SHAPES[impl]:
    x = CONTENTS[content](shape)
    got = run(function, impl, x, power_of_two=power_of_two)
    oracle.assert_same(got, want(x, power_of_two=power_of_two))


@pytest.mark.parametrize("form", FUNCTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_bits_of_bf16_input_and_e5m2_codes(impl, form):
  function, want = FUNCTIONS[form]
  x = tricky((256, 256)).astype(ml_dtypes.bfloat16)
  got = run(function, impl, x, dtype=jnp.float8_e5m2)
  oracle.assert_same(got, want(x, dtype=oracle.E5M2))
  oracle.assert_same(run(function, impl, x), want(x))


@pytest.mark.parametrize("impl", IMPLS)
def test_every_bf16_value_against_many_scales(impl):
  """Rounding of the quotient and of the code, at magnitudes up to each row's own."""
  values = np.arange(0x7F80, dtype=np.uint16).view(ml_dtypes.bfloat16)
  values = values[np.isfinite(values) & (values < 1e30)].astype(np.float32)
  rng = np.random.default_rng(2)
  x = rng.choice(values[values > 1e-8], (512, 128)).astype(np.float32)
  largest = np.exp2(rng.uniform(-13, 90, 512)).astype(ml_dtypes.bfloat16)
  largest = largest.astype(np.float32)[:, None]
  x = np.where(x < largest, x, largest * rng.uniform(0, 1, x.shape)).astype(np.float32)
  x = x.astype(ml_dtypes.bfloat16)
  x[:, 0] = largest[:, 0]
  oracle.assert_same(run(qz.quantize_rows, impl, x), oracle.rows(x))
  x = np.ascontiguousarray(x.T)
  oracle.assert_same(run(qz.quantize_columns, impl, x), oracle.columns(x))


@pytest.mark.parametrize("impl", IMPLS)
def test_scales_of_zero_tiles_and_saturation(impl):
  x = np.zeros((128, 256), np.float32)
  x[1, :128] = -3.0
  x[1, 128:] = 9e-5  # below the clamp
  q_MK, s_kM = run(qz.quantize_rows, impl, x)
  smallest = np.float32(1e-4) / np.float32(448)
  np.testing.assert_array_equal(
    np.asarray(s_kM)[:, :2],
    np.float32([[smallest, np.float32(3) / np.float32(448)], [smallest] * 2]),
  )
  q_MK = np.asarray(q_MK, np.float32)
  assert (q_MK[0] == 0).all()
  assert (q_MK[1, :128] == -448).all()
  assert (q_MK[1, 128:] == 416).all()  # 9e-5 / 1e-4 * 448 = 403.2, to 4 bits


@pytest.mark.parametrize("impl", IMPLS)
def test_a_poisoned_tile_is_seen_and_alone(impl):
  """NaN and infinity make their own tile NaN, codes and scale, and no other."""
  x = np.ones((256, 256), np.float32)
  x[3, 5], x[200, 130] = np.nan, -np.inf
  (q_MK, s_kM), (q_KM, s_mK) = run(qz.quantize_both, impl, x)
  bad_rows, bad_columns = np.zeros((2, 256), bool), np.zeros((2, 256), bool)
  bad_rows[0, 3] = bad_rows[1, 200] = bad_columns[0, 5] = bad_columns[1, 130] = True
  np.testing.assert_array_equal(np.isnan(s_kM), bad_rows)
  np.testing.assert_array_equal(np.isnan(s_mK), bad_columns)
  np.testing.assert_array_equal(
    np.isnan(np.asarray(q_MK, np.float32)), bad_rows.repeat(128, 0).T
  )
  np.testing.assert_array_equal(
    np.isnan(np.asarray(q_KM, np.float32)), bad_columns.repeat(128, 0).T
  )


@functools.cache
def with_rows(function):
  return lambda x, rows, impl: function(x, rows=rows, impl=impl)


@pytest.mark.parametrize("valid", [0, 1, 130, 256])
@pytest.mark.parametrize("form", ["rows", "columns", "both"])
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_are_not_valid_count_as_zeros(impl, form, valid):
  function, want = FUNCTIONS[form]
  x = tricky((256, 256), seed=3)
  clean = np.where(np.arange(256)[:, None] < valid, x, 0)
  x[valid:] = np.nan
  got = run(with_rows(function), impl, x, jnp.int32(valid))
  oracle.assert_same(got, want(clean))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [oracle.E4M3, oracle.E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("impl", ["reference", GPU])
def test_requantize_columns(impl, dtype, power_of_two):
  """Codes of values, below them every code there is, NaN too, and many scales."""
  options = {"power_of_two": power_of_two, "dtype": dtype}
  requantize = compiled(qz.requantize_columns, impl, **options)
  for M, K in [(256, 384), (192, 576)]:
    codes = np.arange(M * K, dtype=np.uint8).reshape(M, K).view(dtype)
    codes[: M // 2] = oracle.rows(tricky((M // 2, K), seed=4), dtype=dtype)[0]
    s_kM = np.random.default_rng(4).integers(-20, 20, (-(-K // 128), M))
    s_kM = np.exp2(s_kM).astype(np.float32) * np.float32(1 if power_of_two else 1.1)
    plain = codes.astype(np.float32) * s_kM.T.repeat(128, 1)[:, :K]
    got = requantize(jnp.asarray(codes), jnp.asarray(s_kM))
    oracle.assert_same(got, oracle.columns(plain, **options))
    got = requantize(jnp.asarray(codes), jnp.asarray(s_kM), rows=M // 2 - 6)
    plain[M // 2 - 6 :] = 0
    oracle.assert_same(got, oracle.columns(plain, **options))


def test_powers_of_two_change_nothing_when_tiled_twice():
  """Why V3 uses them there: codes move by whole exponents, so only what falls below
  the new tile's smallest subnormal, a 2^-9 of its scale, is rounded again."""
  x = np.random.default_rng(5).normal(size=(256, 256)).astype(np.float32)
  q_MK, s_kM = qz.quantize_rows(jnp.asarray(x), power_of_two=True)
  once = qz.dequantize_rows(q_MK, s_kM)
  q_KM, s_mK = qz.requantize_columns(q_MK, s_kM)
  twice = qz.dequantize_columns(q_KM, s_mK)
  error = abs(np.asarray(twice) - np.asarray(once))
  assert (error <= np.asarray(s_mK).repeat(128, 0) * 2.0**-10).all()
  above = abs(np.asarray(once)) >= np.asarray(s_mK).repeat(128, 0) * 2.0**-6
  assert above.mean() > 0.9
  assert (error[above] == 0).all()
  q_MK, s_kM = qz.quantize_rows(jnp.asarray(x))
  q_KM, s_mK = qz.requantize_columns(q_MK, s_kM, power_of_two=False)
  twice = np.asarray(qz.dequantize_columns(q_KM, s_mK))
  assert (twice != np.asarray(qz.dequantize_rows(q_MK, s_kM))).mean() > 0.5


@pytest.mark.parametrize("impl", IMPLS)
def test_experts(impl):
  w = np.stack([tricky((256, 192), seed=6), tricky((256, 192), seed=7)])
  got = run(qz.quantize_blocks, impl, w)
  for e in range(2):
    one = jax.tree.map(lambda a, e=e: a[e], got)
    oracle.assert_same(one, oracle.blocks(w[e]))


def test_no_rows():
  """An expert without tokens: whatever the platform picks, shapes stay right."""
  x = jnp.zeros((0, 256), jnp.bfloat16)
  (q_MK, s_kM), (q_KM, s_mK) = jax.jit(qz.quantize_both)(x)
  shapes = q_MK.shape, s_kM.shape, q_KM.shape, s_mK.shape
  assert shapes == ((0, 256), (2, 0), (256, 0), (0, 256))
  p_MP, s_kM = qz.pack_e5m6(x)
  assert qz.unpack_e5m6(p_MP, s_kM).shape == (0, 256)
  got = qz.swiglu_quantize_backward(x, jnp.zeros(0), x[:, :128], with_y=True)
  assert got.dh_columns[0].shape == (256, 0)
  assert got.dgate_Z.shape == (0,)


def test_one_scale_a_tensor():
  x = tricky((7, 99)).reshape(7, 9, 11)
  q, s = jax.jit(qz.quantize_tensor)(x)
  want = oracle.tile_scale(x)
  oracle.assert_same((q, s), (oracle.tile_codes(x, want), np.array(want)))


@pytest.mark.parametrize("shape", [(200, 576), (128, 256)])
def test_dequantize(shape):
  """Within half a unit of the code's last place: 2^-4 relative, 2^-10 s below that."""
  x = tricky(shape)
  dequantized = [
    (qz.dequantize_rows(*qz.quantize_rows(x)), oracle.rows(x)[1].T.repeat(128, 1)),
    (
      qz.dequantize_columns(*qz.quantize_columns(x)),
      oracle.columns(x)[1].repeat(128, 0),
    ),
    (
      qz.dequantize_blocks(*qz.quantize_blocks(x)[0]),
      oracle.blocks(x)[0][1].repeat(128, 0).repeat(128, 1),
    ),
  ]
  for y, s in dequantized:
    s = s[: shape[0], : shape[1]]
    assert y.dtype == jnp.float32
    bound = np.maximum(abs(x) * 2.0**-4, s * 2.0**-10) * (1 + 1e-6)
    assert (abs(np.asarray(y) - x) <= bound).all()
  (_, s), (q_NK, s_nk) = qz.quantize_blocks(x)
  transposed = qz.dequantize_blocks(q_NK, s_nk, dtype=jnp.bfloat16)
  assert transposed.dtype == jnp.bfloat16
  np.testing.assert_array_equal(transposed.T, dequantized[2][0].astype(jnp.bfloat16))


@pytest.mark.parametrize("impl", IMPLS)
def test_rounding_is_unbiased(impl):
  """The mean error of 2^20 uniform values is within 4 standard errors of zero."""
  x = np.random.default_rng(8).uniform(0, 1, (2048, 512)).astype(np.float32)
  x[:, ::128] = (
    1.0  # one scale for all, so that nothing depends on the sample's largest
  )
  q_MK, s_kM = run(qz.quantize_rows, impl, x)
  error = np.asarray(qz.dequantize_rows(q_MK, s_kM), np.float64) - x
  assert abs(error.mean()) < 4 * error.std() / np.sqrt(error.size)
  assert error.std() > 1e-3


def test_refusals():
  x = jnp.ones((4, 128))
  with pytest.raises(ValueError, match="impl='nosuch' is unknown"):
    qz.quantize_rows(x, impl="nosuch")
  with pytest.raises(ValueError, match="quantize_both needs a matrix of bfloat16 or"):
    qz.quantize_both(x[0])
  with pytest.raises(ValueError, match=r"quantize_rows needs .* got int32"):
    qz.quantize_rows(x.astype(jnp.int32))
  for name in {"gpu", "tpu"} - {target_platform()}:
    with pytest.raises(ValueError, match=f"impl='{name}' does not run on platform"):
      qz.quantize_rows(x, impl=name)
  with pytest.raises(ValueError, match="impl='gpu' is unknown, use one of"):
    qz.pack_e5m6(x, impl="gpu")
  with pytest.raises(ValueError, match="multiple of 8, got 12"):
    qz.pack_e5m6(x[:, :12])
  with pytest.raises(ValueError, match="needs 4 gates"):
    qz.swiglu_quantize(x, jnp.ones(3))
  with pytest.raises(ValueError, match=r"needs h \[Z, 2F\]"):
    qz.swiglu_quantize(x[:, :5])
  with pytest.raises(ValueError, match=r"needs dy \[4, 64\], got \[4, 128\]"):
    qz.swiglu_quantize_backward(x, None, x)
