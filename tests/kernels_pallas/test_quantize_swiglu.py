"""Fused SwiGLU against NumPy in float64 and JAX's derivative of the plain formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import quantize as qz
from tests.kernels_pallas import quantize_oracle as oracle
from tests.kernels_pallas.test_quantize import GPU

IMPLS = ["reference", GPU]
Z, F = 256, 384
# Error of the FP32 formulas relative to a sum of magnitudes: a few roundings, and an
# exponential that is good to about 2^-22 (times the exponent, on GPU).
FP32 = 2.0**-18


def inputs(seed=0, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  h = rng.normal(size=(Z, 2 * F)) * 3
  dy = rng.normal(size=(Z, F)) * np.exp2(rng.integers(-12, 3, (Z, 1)))
  gate = rng.uniform(0.01, 1, Z)
  return jnp.asarray(h, dtype), jnp.asarray(gate, jnp.float32), jnp.asarray(dy, dtype)


def skip_unless_taken(impl, dtype):
  if impl == "gpu" and dtype == jnp.float32:
    pytest.skip("the kernel takes BF16")


def exact(h, gate, dy):
  """y, dh, dgate in float64, written out."""
  h, gate, dy = (np.asarray(a, np.float64) for a in (h, gate, dy))
  a, u = h[:, :F], h[:, F:]
  sigmoid = 1 / (1 + np.exp(-a))
  y = a * sigmoid * u
  da = dy * gate[:, None] * u * (sigmoid + a * sigmoid * (1 - sigmoid))
  du = dy * gate[:, None] * a * sigmoid
  return y * gate[:, None], np.concatenate([da, du], 1), (dy * y).sum(1)


def assert_quantised(got, want, quantise, relative=FP32):
  """Codes and scales of `want`, but for codes whose value lies by a rounding boundary.

  The FP32 values err by up to `relative`, so the scales do, and a code may be the
  neighbour of the right one where the exact quotient is that close to the middle.
  """
  q, s = (np.asarray(a) for a in got)
  (q_want, s_want), transpose = quantise(want.astype(np.float32)), want.shape != q.shape
  assert (q.shape, q.dtype, s.shape) == (q_want.shape, q_want.dtype, s_want.shape)
  np.testing.assert_allclose(s, s_want, rtol=2 * relative)
  exact_rows = want.T if transpose else want
  scale = s.T.repeat(128, 1)[:, : exact_rows.shape[1]].astype(np.float64)
  differ = q.astype(np.float32) != q_want.astype(np.float32)
  low, high = exact_rows * (1 - 4 * relative), exact_rows * (1 + 4 * relative)
  either = [np.clip(v / scale, -448, 448).astype(q.dtype) for v in (low, high)]
  fits = np.zeros(q.shape, bool)
  for code in either:
    fits |= code.astype(np.float32) == q.astype(np.float32)
  assert fits[differ].all()
  assert differ.mean() < 1e-3


def assert_quantisation_of(plain, got, quantise, impl):
  """Bits, where dh is quantised from what is returned; the GPU's kernel keeps its own
  FP32 values, so there scales agree closely and nearly all codes."""
  want = quantise(plain)
  if impl == "reference":
    oracle.assert_same(got, want)
    return
  (q, s), (q_want, s_want) = got, want
  q, q_want = (np.asarray(a, np.float32) for a in (q, q_want))
  np.testing.assert_allclose(s, s_want, rtol=2.0**-12)
  assert (q != q_want).mean() < 1e-3
  np.testing.assert_allclose(q, q_want, rtol=2.0**-3, atol=2.0**-9)


@functools.cache
def forward(impl, both, gated, power_of_two):
  def f(h, gate, rows):
    return qz.swiglu_quantize(
      h,
      gate if gated else None,
      both=both,
      power_of_two=power_of_two,
      rows=rows,
      impl=impl,
    )

  return jax.jit(f)


@functools.cache
def backward(impl, gated, **options):
  def f(h, gate, dy, rows):
    gate = gate if gated else None
    return qz.swiglu_quantize_backward(h, gate, dy, rows=rows, impl=impl, **options)

  return jax.jit(f)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("impl", IMPLS)
def test_forward(impl, gated, dtype):
  skip_unless_taken(impl, dtype)
  h, gate, dy = inputs(dtype=dtype)
  y, _, _ = exact(h, gate if gated else np.ones(Z), dy)
  assert_quantised(forward(impl, False, gated, False)(h, gate, Z), y, oracle.rows)
  rows, columns = forward(impl, True, gated, True)(h, gate, Z)
  assert_quantised(rows, y, functools.partial(oracle.rows, power_of_two=True))
  assert_quantised(columns, y, functools.partial(oracle.columns, power_of_two=True))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("impl", IMPLS)
def test_backward(impl, gated, dtype):
  skip_unless_taken(impl, dtype)
  h, gate, dy = inputs(seed=1, dtype=dtype)
  y, dh, dgate = exact(h, gate if gated else np.ones(Z), dy)
  got = backward(impl, gated, with_y=True, with_dh=jnp.float32)(h, gate, dy, Z)
  # 1 + a (1 - sigmoid) cancels where silu' passes through 0: absolute error there.
  magnitude = np.abs(np.asarray(dy, np.float64)) * (1 + abs(np.asarray(h)).max())
  bound = FP32 * np.concatenate([magnitude, magnitude], 1) * 12
  assert (abs(np.asarray(got.dh_Z2F, np.float64) - dh) <= bound).all()
  plain = np.asarray(got.dh_Z2F)
  assert_quantisation_of(plain, got.dh_rows, oracle.rows, impl)
  assert_quantisation_of(plain, got.dh_columns, oracle.columns, impl)
  assert_quantised(got.y_columns, y, oracle.columns)
  if gated:
    terms = abs(np.asarray(dy, np.float64) * y / np.asarray(gate)[:, None]).sum(1)
    assert (abs(got.dgate_Z - dgate) <= F * 2.0**-24 * terms + FP32 * terms).all()
    assert got.dgate_Z.dtype == jnp.float32
  else:
    assert got.dgate_Z is None


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_leaves_out_what_is_not_asked_for(impl):
  h, gate, dy = inputs(seed=2, dtype=jnp.bfloat16)
  got = backward(impl, True)(h, gate, dy, Z)
  assert got.y_columns is None
  assert got.dh_Z2F is None
  more = backward(impl, True, with_y=True, with_dh=jnp.bfloat16)(h, gate, dy, Z)
  assert more.dh_Z2F.dtype == jnp.bfloat16
  plain = np.asarray(more.dh_Z2F, np.float64)
  _, dh, _ = exact(h, gate, dy)
  assert (abs(plain - dh) <= abs(dh) * 2.0**-8 + 1e-4).all()


def test_derivatives_are_jax_s_own():
  h, gate, dy = inputs(seed=3)

  def swiglu(h, gate):
    a, u = jnp.split(h, 2, axis=1)
    return jax.nn.silu(a) * u * gate[:, None]

  _, vjp = jax.vjp(swiglu, h, gate)
  dh, dgate = vjp(dy)
  got = backward("reference", True, with_dh=jnp.float32)(h, gate, dy, Z)
  scale = abs(np.asarray(dy)).max(1, keepdims=True) * 100
  assert (abs(got.dh_Z2F - dh) <= FP32 * scale).all()
  np.testing.assert_allclose(got.dgate_Z, dgate, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_the_input_too(impl):
  """What quantize_rows would make of it, with powers of two; y stays as it is."""
  h, gate, dy = inputs(seed=7, dtype=jnp.bfloat16)
  y, _, _ = exact(h, gate, dy)

  @jax.jit
  def f(h, rows):
    return qz.swiglu_quantize(h, gate, with_h=True, rows=rows, impl=impl)

  of_y, of_h = f(h.at[200:].set(jnp.nan), 200)
  valid = np.arange(Z)[:, None] < 200
  assert_quantised(of_y, np.where(valid, y, 0), oracle.rows)
  clean = np.where(valid, np.asarray(h, np.float32), 0)
  oracle.assert_same(of_h, oracle.rows(clean, power_of_two=True))
  _, of_h = f(h.at[3, 5].set(jnp.nan), Z)
  poisoned = np.asarray(h, np.float32)
  poisoned[3, 5] = np.nan
  oracle.assert_same(of_h, oracle.rows(poisoned, power_of_two=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_from_fp8_rows(impl):
  """Quantised h gives what its dequantised values give."""
  h, gate, dy = inputs(seed=4, dtype=jnp.bfloat16)
  q_h, s_h = qz.quantize_rows(h)
  wide = qz.dequantize_rows(q_h, s_h)
  oracle_y, oracle_dh, _ = exact(wide, gate, dy)
  rows, columns = forward(impl, True, True, False)((q_h, s_h), gate, Z)
  assert_quantised(rows, oracle_y, oracle.rows)
  assert_quantised(columns, oracle_y, oracle.columns)
  options = {"with_y": True, "with_dh": jnp.float32}
  got = backward(impl, True, **options)((q_h, s_h), gate, dy, Z)
  want = backward("reference", True, **options)(wide, gate, dy, Z)
  np.testing.assert_allclose(got.dh_Z2F, want.dh_Z2F, rtol=1e-4, atol=1e-5)
  assert (abs(np.asarray(got.dh_Z2F) - oracle_dh) <= 1e-3).all()
  plain = np.asarray(got.dh_Z2F)
  assert_quantisation_of(plain, got.dh_columns, oracle.columns, impl)
  assert_quantised(got.y_columns, oracle_y, oracle.columns)


@pytest.mark.parametrize("valid", [0, 130])
@pytest.mark.parametrize("impl", IMPLS)
def test_padding_is_never_read(impl, valid):
  h, gate, dy = inputs(seed=5, dtype=jnp.bfloat16)
  pad = (jnp.arange(Z) >= valid)[:, None]
  clean = jnp.where(pad, 0, h), jnp.where(pad[:, 0], 0, gate), jnp.where(pad, 0, dy)
  poison = (
    jnp.where(pad, jnp.nan, h),
    jnp.where(pad[:, 0], jnp.inf, gate),
    jnp.where(pad, -jnp.inf, dy),
  )
  f = forward(impl, True, True, False)
  b = backward(impl, True, with_y=True, with_dh=jnp.float32)
  for got, want in [
    (f(*poison[:2], valid), f(*clean[:2], Z)),
    (b(*poison, valid), b(*clean, Z)),
  ]:
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      np.testing.assert_array_equal(
        np.asarray(g, np.float32), np.asarray(w, np.float32)
      )
  (q_ZF, s_fZ), _ = f(*poison[:2], valid)
  assert (np.asarray(q_ZF, np.float32)[valid:] == 0).all()
  assert (np.asarray(s_fZ)[:, valid:] == np.float32(1e-4) / np.float32(448)).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_poisoned_row_is_seen(impl):
  h, gate, dy = inputs(seed=6, dtype=jnp.bfloat16)
  (q_ZF, _), (q_FZ, _) = forward(impl, True, True, False)(
    h.at[3, 5].set(jnp.nan), gate, Z
  )
  q_ZF, q_FZ = np.asarray(q_ZF, np.float32), np.asarray(q_FZ, np.float32)
  assert np.isnan(q_ZF[3, :128]).all()
  assert np.isnan(q_FZ[5, :128]).all()
  assert np.isfinite(q_ZF[4]).all()
  got = backward(impl, True)(h, gate, dy.at[7, 300].set(jnp.inf), Z)
  q_Z2F = np.asarray(got.dh_rows[0], np.float32)
  assert np.isnan(q_Z2F[7, 256:384]).all()
  assert not np.isfinite(np.asarray(got.dgate_Z)[7])
