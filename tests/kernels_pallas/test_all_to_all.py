"""One suite over every implementation, against a literal NumPy reading of DeepEP.

Order of rows, once to each rank, an unweighted combine, gradients as transposes.

A body is compiled once for an implementation and a number of ranks, and serves every
routing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas import all_to_all as a2a
from kernels_pallas.choose import target_platform

AXIS = "expert"
M, D = 12, 256  # tokens of a rank; GPU and TPU want rows of whole vectors
LOCAL, ACTIVE = 3, 3  # experts of a rank, choices of a token
RANKS = sorted({1, min(len(jax.devices()), 8)})


def on(platform):
  return pytest.mark.skipif(target_platform() != platform, reason=f"not on {platform}")


IMPLS = [
  "reference",
  pytest.param("gpu", marks=[pytest.mark.gpu, on("gpu")]),
  pytest.param("tpu", marks=on("tpu")),
]
KINDS = ["uniform", "skewed", "one rank", "empty"]
every_routing = pytest.mark.parametrize("kind", KINDS)
every_ranks = pytest.mark.parametrize("ranks", RANKS)
every_impl = pytest.mark.parametrize("impl", IMPLS)


@functools.cache
def on_ranks(body, impl, ranks):
  """body(impl, ranks, *local arrays) on each rank; arrays are joined along axis 0."""
  mesh = Mesh(np.array(jax.devices()[:ranks]), (AXIS,))
  local = functools.partial(body, impl, ranks)
  return jax.jit(
    jax.shard_map(
      local, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False
    )
  )


def choices(kind: str, ranks: int) -> np.ndarray:
  """Distinct experts of each token; "empty" leaves most tokens without any."""
  tokens, experts = ranks * M, ranks * LOCAL
  rng = np.random.default_rng(tokens)
  weights = np.ones(experts)
  if kind == "skewed":
    weights[:LOCAL] = 50
  weights /= weights.sum()
  picks = [rng.choice(experts, ACTIVE, replace=False, p=weights) for _ in range(tokens)]
  picks = np.array(picks, np.int32)
  if kind == "one rank":
    picks[:] = np.arange(ACTIVE)
  if kind == "empty":
    picks[rng.uniform(size=picks.shape) < 0.7] = -1
    picks[tokens // 2 :] = -1
  return picks


def tokens_of(ranks: int, dtype=np.float32) -> jax.Array:
  return jnp.asarray(np.random.default_rng(0).normal(size=(ranks * M, D)), dtype)


def ranks_of(chosen) -> set[int]:
  return {e // LOCAL for e in chosen if e >= 0}


def deepep_receive(x, experts, ranks):
  """What rank r receives: for each source rank in order, for each of its tokens in
  order, the token, once, if any of its experts lives on r."""
  return [
    x[[r in ranks_of(chosen) for chosen in experts]].reshape(-1, x.shape[1])
    for r in range(ranks)
  ]


def deepep_combine(received, experts):
  """Unweighted sums over ranks, in float64, of rows in the order above."""
  out = np.zeros((len(experts), received[0].shape[1]))
  for r, rows in enumerate(received):
    sent = [m for m, chosen in enumerate(experts) if r in ranks_of(chosen)]
    for row, m in zip(rows, sent, strict=True):
      out[m] += row
  return out


def copies_of(experts) -> np.ndarray:
  return np.array([[len(ranks_of(chosen))] for chosen in experts])


def plan(experts, ranks, rows=None, home_rows=None):
  ranks_MA = jnp.where(experts < 0, -1, experts // LOCAL)
  return a2a.plan_ranks(ranks_MA, rows or ranks * M, AXIS, home_rows)


def poison(y_CD, route):
  """NaN in every row that nobody sent."""
  return jnp.where(route.is_filled()[:, None], y_CD, jnp.nan)


def there_and_back(impl, ranks, x, experts):
  """Rank r multiplies what it received by r + 1."""
  route = plan(experts, ranks)
  y = a2a.dispatch(x, route, impl)
  scaled = (poison(y, route) * (1 + jax.lax.axis_index(AXIS))).astype(y.dtype)
  out = a2a.combine(scaled, route, impl)
  same = a2a.combine(poison(y, route), route, impl)
  return y, scaled, out, same, route.counts_L, route.overflow[None], route.counts_NB


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
@every_routing
@every_ranks
@every_impl
def test_rows_arrive_in_deepeps_order_and_sum_without_weights(impl, ranks, kind, dtype):
  x, experts = tokens_of(ranks, dtype), choices(kind, ranks)
  y, scaled, out, same, counts, overflow, counts_NB = on_ranks(
    there_and_back, impl, ranks
  )(x, experts)
  wide = np.asarray(x, np.float64)
  y, scaled = (np.asarray(a, np.float64).reshape(ranks, -1, D) for a in (y, scaled))
  wants = deepep_receive(wide, experts, ranks)
  assert not np.any(overflow)
  for r, want in enumerate(wants):
    assert counts[r] == len(want)
    np.testing.assert_array_equal(y[r, : len(want)], want)
  copies = copies_of(experts)
  assert np.asarray(counts_NB)[:ranks].sum() == copies.sum()

  want = deepep_combine(
    [scaled[r, : len(rows)] for r, rows in enumerate(wants)], experts
  )
  # At most 3 terms of one sign in FP32, then one rounding to dtype.
  bound = 3 * 2.0**-24 + float(jnp.finfo(dtype).eps) / 2
  np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=bound)
  # Up to three times x: exact in FP32 but for the rounding of 3x, then rounded once.
  np.testing.assert_array_equal(np.asarray(same), (wide * copies).astype(dtype))


def gradients(impl, ranks, x, experts):
  """Pairs of inner products that must agree, and differences that must be 0."""
  route = plan(experts, ranks)
  y, pull = jax.vjp(lambda x: a2a.dispatch(x, route, impl), x)
  key = jax.random.fold_in(jax.random.key(1), jax.lax.axis_index(AXIS))
  g = poison(jax.random.normal(key, y.shape), route)
  (dx,) = pull(g)
  out, push = jax.vjp(lambda y: a2a.combine(y, route, impl), g)
  (dg,) = push(x)
  known = route.is_filled()[:, None]
  sums = [jnp.where(known, y * g, 0).sum(), (x * dx).sum()]
  sums += [(out * x).sum(), jnp.where(known, g * dg, 0).sum()]
  zeros = [abs(dx - out).max(), abs(dg - jnp.where(known, y, 0)).max()]
  return jax.lax.psum(jnp.stack(sums), AXIS)[None], jnp.stack(zeros)[None]


@every_routing
@every_ranks
@every_impl
def test_dispatch_and_combine_are_each_others_gradient(impl, ranks, kind):
  sums, zeros = on_ranks(gradients, impl, ranks)(tokens_of(ranks), choices(kind, ranks))
  # Sums of up to 73,728 products of about 1 in FP32.
  np.testing.assert_allclose(sums[0], np.broadcast_to(sums[0, 0], 4), atol=2e-2)
  assert abs(sums[0, 0]) > 1
  assert np.all(np.asarray(zeros) == 0)


def fp8_payload(impl, ranks, codes, scales, experts):
  route = plan(experts, ranks)
  sent = a2a.send_rows(
    [codes, scales],
    route.address_MA,
    M,
    route.counts_L.sum(),
    rows=route.rows,
    axis=AXIS,
    impl=impl,
  )
  return (*sent, route.counts_L)


@every_ranks
@every_impl
def test_codes_and_scales_travel_together(impl, ranks):
  """Bits unchanged, NaN codes too."""
  experts, rng = choices("uniform", ranks), np.random.default_rng(2)
  codes = jnp.asarray(rng.integers(0, 256, size=(ranks * M, D)), jnp.uint8)
  codes = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
  scales = jnp.asarray(rng.normal(size=(ranks * M, D // 2)), jnp.float32)
  *sent, counts = on_ranks(fp8_payload, impl, ranks)(codes, scales, experts)
  for got, value in zip(sent, (codes, scales)):
    bits = f"uint{8 * value.dtype.itemsize}"
    got = np.asarray(got).view(bits).reshape(ranks, ranks * M, -1)
    for r, want in enumerate(
      deepep_receive(np.asarray(value).view(bits), experts, ranks)
    ):
      assert counts[r] == len(want)
      np.testing.assert_array_equal(got[r, : len(want)], want)


def several(impl, ranks, x, gates, experts):
  """Tokens, gates and experts in one call; gradients of x and gates."""
  route = plan(experts, ranks)
  (y, g, e), pull = jax.vjp(
    lambda x, gates: a2a.dispatch((x, gates, experts), route, impl), x, gates
  )
  back_x, back_gates = pull(
    (poison(2 * y, route), poison(3 * g, route), np.zeros(e.shape, jax.dtypes.float0))
  )
  return y, g, e, back_x, back_gates


@every_ranks
@every_impl
def test_what_travels_beside_tokens(impl, ranks):
  x, experts = tokens_of(ranks), choices("skewed", ranks)
  gates = np.random.default_rng(3).uniform(size=experts.shape).astype(np.float32)
  *sent, back_x, back_gates = on_ranks(several, impl, ranks)(x, gates, experts)
  for got, value in zip(sent, (np.asarray(x), gates, experts)):
    got = np.asarray(got).reshape(ranks, ranks * M, -1)
    for r, want in enumerate(deepep_receive(value, experts, ranks)):
      np.testing.assert_array_equal(got[r, : len(want)], want)
  copies = copies_of(experts)  # sums of up to three equal terms in FP32
  np.testing.assert_allclose(back_x, 2 * copies * np.asarray(x), rtol=2e-7)
  np.testing.assert_allclose(back_gates, 3 * copies * gates, rtol=4e-7)


def decoding(impl, ranks, x, experts, gates):
  route = a2a.plan_experts(experts, LOCAL, ranks * M, AXIS)
  y = poison(a2a.dispatch(x, route, impl), route)
  home = a2a.bring_home(y, route, impl)
  weighted = jnp.where(
    (experts < 0)[:, :, None], 0, gates[:, :, None] * home[route.home_MA]
  ).sum(1)
  return y, route.counts_L, weighted, a2a.combine(y, route, impl)


@every_routing
@every_ranks
@every_impl
def test_decoding_lays_rows_out_by_local_expert(impl, ranks, kind):
  """An expert's rows stand by source rank, then token; gates are applied at home."""
  x, experts = tokens_of(ranks), choices(kind, ranks)
  gates = np.random.default_rng(3).uniform(size=experts.shape).astype(np.float32)
  y, counts, weighted, plain = on_ranks(decoding, impl, ranks)(x, experts, gates)
  y, x = np.asarray(y).reshape(ranks * LOCAL, ranks * M, D), np.asarray(x)
  for e in range(ranks * LOCAL):
    want = x[(experts == e).any(1)]
    assert counts[e] == len(want)
    np.testing.assert_array_equal(y[e, : len(want)], want)
    assert np.isnan(y[e, len(want) :]).all()
  # Sums of three terms in FP32.
  total = np.where(experts < 0, 0, gates).sum(1, keepdims=True, dtype=np.float64)
  np.testing.assert_allclose(weighted, x * total, rtol=5e-7, atol=1e-7)
  chosen = (experts >= 0).sum(1, keepdims=True)
  np.testing.assert_allclose(plain, x * chosen, rtol=2e-7)


def bounded(impl, ranks, x, experts):
  route = plan(experts, ranks, rows=M // 2 + 1)
  back = a2a.combine(poison(a2a.dispatch(x, route, impl), route), route, impl)
  small_home = plan(experts, ranks, home_rows=2)
  return back, route.counts_L, route.overflow[None], small_home.overflow[None]


@every_ranks
@every_impl
def test_bounds_that_are_exceeded_are_reported_everywhere(impl, ranks):
  x, experts = tokens_of(ranks), np.full((ranks * M, ACTIVE), -1, np.int32)
  experts[::2, 0] = np.arange(ranks * M // 2) % ranks * LOCAL  # M / 2 for each rank
  run = on_ranks(bounded, impl, ranks)
  back, counts, overflow, home_overflow = run(x, experts)
  assert not np.any(overflow)
  assert np.all(home_overflow)
  assert np.all(np.asarray(counts) == M // 2)
  np.testing.assert_array_equal(back, np.where(experts[:, :1] < 0, 0, x))
  back, counts, overflow, _ = run(x, np.zeros_like(experts))
  assert np.all(overflow)
  assert counts[0] == M // 2 + 1
  assert np.isfinite(np.asarray(back)).all()


def scan(impl, ranks, x, experts):
  def step(x, experts):
    route = plan(experts, ranks)
    y = poison(a2a.dispatch(x, route, impl) + 1, route)
    return a2a.combine(y, route, impl) / 2, None

  return jax.lax.scan(step, x, jnp.swapaxes(experts, 0, 1))[0]


@every_ranks
@every_impl
def test_steps_of_a_scan_do_not_see_each_other(impl, ranks):
  """Buffers are used again from step to step while routes change."""
  experts = np.stack([choices(KINDS[i % 3], ranks) for i in range(6)], axis=1)
  x = tokens_of(ranks)
  out = on_ranks(scan, impl, ranks)(x, experts)
  want = np.asarray(x, np.float64)
  for i in range(6):
    want = (want + 1) * copies_of(experts[:, i]) / 2
  # A few roundings a step in FP32.
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
@every_impl
def test_axes_beside_it_are_kept_apart(impl):
  """Two exchanges at once over (2, n) devices; with n = 1, each rank with itself."""
  ranks = min(len(jax.devices()) // 2, 4)
  devices = np.array(jax.devices()[: 2 * ranks]).reshape(2, ranks)
  mesh = Mesh(devices, ("data", AXIS))
  spec = P(("data", AXIS))
  body = functools.partial(there_and_back, impl, ranks)
  run = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  x = tokens_of(2 * ranks)
  experts = np.concatenate([choices(kind, ranks) for kind in ("uniform", "empty")])
  y, _, _, same, counts, *_ = jax.jit(run)(x, experts)
  want = (np.asarray(x, np.float64) * copies_of(experts)).astype(np.float32)
  np.testing.assert_array_equal(same, want)
  y, half = np.asarray(y).reshape(2, ranks, ranks * M, D), ranks * M
  for i in range(2):
    mine = slice(i * half, (i + 1) * half)
    for r, want in enumerate(deepep_receive(np.asarray(x)[mine], experts[mine], ranks)):
      assert counts[i * ranks + r] == len(want)
      np.testing.assert_array_equal(y[i, r, : len(want)], want)


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
@every_impl
def test_several_axes_are_one(impl):
  """Over (2, 2) devices as over 4."""
  x, experts = tokens_of(4), choices("uniform", 4)

  def both(axis, x, experts):
    route = a2a.plan_experts(experts, LOCAL, 4 * M, axis)
    y = poison(a2a.dispatch(x, route, impl), route)
    return y, a2a.combine(y, route, impl)

  def run(shape, axes):
    spec, mesh = P(axes), Mesh(np.array(jax.devices()[:4]).reshape(shape), axes)
    body = functools.partial(both, axes if len(axes) > 1 else axes[0])
    local = jax.shard_map(
      body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    return jax.jit(local)(x, experts)

  for one, two in zip(run((4,), (AXIS,)), run((2, 2), ("node", AXIS))):
    np.testing.assert_array_equal(one, two)


def test_refusals():
  x, address = jnp.zeros((4, D)), jnp.zeros((4, 2), jnp.int32)
  send = functools.partial(
    a2a.send_rows, count=4, received=jnp.int32(0), rows=8, axis=AXIS
  )
  with pytest.raises(ValueError, match="impl='nosuch' is unknown"):
    send([x], address, impl="nosuch")
  for name in {"gpu", "tpu"} - {target_platform()}:
    with pytest.raises(ValueError, match=f"impl='{name}' does not run on platform"):
      send([x], address, impl=name)
  with pytest.raises(ValueError, match=r"values \[M, ...\] and addresses \[M, A\]"):
    send([x, x[:3]], address)
  with pytest.raises(ValueError, match="int32 addresses, got float32"):
    send([x], address.astype(jnp.float32))
  with pytest.raises(ValueError, match=r"as many as addresses, .* sources \(3,\)"):
    send([x], address, source_M=jnp.zeros(3, jnp.int32))
  with pytest.raises(ValueError, match="int32 sources, got uint8"):
    send([x], address, source_M=jnp.zeros(4, jnp.uint8))


def test_addresses_that_do_not_fit_int32_are_refused():
  def body(impl, ranks, experts):
    return plan(experts, ranks, rows=2**31 // ranks).counts_L

  with pytest.raises(ValueError, match="addresses are int32"):
    on_ranks(body, None, RANKS[-1])(choices("uniform", RANKS[-1]))
