"""Routing against NumPy: selection, gates, the bias rule, balance losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import BalanceConfig, ModelConfig
from deepseek_jax.model import router
from deepseek_jax.presets import TINY, V2, V3

SMALL = dataclasses.replace(TINY, dim=16, n_mtp_layers=0)
V2_LIKE = dataclasses.replace(
  SMALL,
  score_func="softmax",
  group_score="max",
  norm_topk_prob=False,
  use_router_bias=False,
  n_limited_groups=3,
  route_scale=16.0,
)


def select_by_hand(biased: np.ndarray, config: ModelConfig) -> list[int]:
  """Experts of one token, ties to the lowest index."""
  groups = np.split(biased, config.n_expert_groups)
  size = len(groups[0])
  top = 2 if config.group_score == "top2_sum" else 1
  # FP32 sums, so that ties of groups are the same ties.
  worth = [np.sum(np.sort(g)[::-1][:top], dtype=np.float32) for g in groups]
  order = sorted(range(len(worth)), key=lambda g: (-worth[g], g))
  kept = set(order[: config.n_limited_groups])
  allowed = [e for e in range(len(biased)) if e // size in kept]
  return sorted(allowed, key=lambda e: (-biased[e], e))[: config.n_activated_experts]


@pytest.mark.parametrize("config", [SMALL, V2_LIKE], ids=["v3", "v2"])
@pytest.mark.parametrize("shift", [0.0, -2.0])
def test_selection_equals_numpy(config, shift):
  rng = np.random.default_rng(0)
  # Rounded to 1/16 so that ties abound; a bias of -2 makes every score negative.
  scores = (rng.integers(0, 17, (200, 16)) / 16).astype(np.float32)
  bias = (rng.integers(-4, 5, 16) / 16 + shift).astype(np.float32)
  bias = bias if config.use_router_bias else np.zeros(16, np.float32)
  chosen = router.select_experts(
    jnp.asarray(scores), jnp.asarray(bias) if config.use_router_bias else None, config
  )
  expected = [select_by_hand(row + bias, config) for row in scores]
  np.testing.assert_array_equal(chosen, expected)


def test_logits_of_bf16_tokens_are_fp32():
  """On a GPU they are multiplied in BF16 terms: with two of three it errs by 29."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(64, 64)), jnp.bfloat16)
  weight, dy = (jnp.asarray(rng.normal(size=(64, n)), jnp.float32) for n in (32, 32))
  got, pull = jax.vjp(lambda weight: router.logits(x, weight), weight)
  for result, a, b in [(got, x, weight), (pull(dy)[0], x.T, dy)]:
    assert result.dtype == jnp.float32
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    # 64 is the bound of a sum of 64 in the worst order, 3 what FP32 comes to on a CPU.
    bound = 8 * 2.0**-24 * (abs(a) @ abs(b))
    assert (abs(np.asarray(result, np.float64) - a @ b) <= bound).all()


def test_bias_selects_but_never_weighs():
  config = dataclasses.replace(SMALL, n_expert_groups=1, n_limited_groups=1)
  module = router.Router(config, jax.random.key(0))
  x = jax.random.normal(jax.random.key(1), (5, config.dim))
  module.bias[...] = jnp.where(jnp.arange(16) < 4, 10.0, 0.0)
  scores, experts, gates = module(x)
  np.testing.assert_array_equal(np.sort(experts, -1), np.tile(np.arange(4), (5, 1)))
  plain = np.take_along_axis(np.asarray(scores), np.asarray(experts), 1)
  expected = config.route_scale * plain / plain.sum(-1, keepdims=True)
  np.testing.assert_allclose(gates, expected, rtol=1e-6)


def test_gates_of_v2_are_raw_probabilities_times_16():
  module = router.Router(V2_LIKE, jax.random.key(0))
  x = jax.random.normal(jax.random.key(1), (5, V2_LIKE.dim))
  scores, experts, gates = module(x)
  np.testing.assert_allclose(np.asarray(scores).sum(-1), 1, rtol=1e-6)
  taken = np.take_along_axis(np.asarray(scores), np.asarray(experts), 1)
  np.testing.assert_allclose(gates, 16 * taken, rtol=1e-6)
  assert V2.route_scale == 16
  assert V3.norm_topk_prob


@pytest.mark.parametrize(
  ("counts", "signs"),
  [
    ([5, 5, 5, 5], [0, 0, 0, 0]),
    ([4, 5, 5, 6], [1, 0, 0, -1]),
    ([4, 5, 5, 5], [1, -1, -1, -1]),  # mean 4.75
    # Beyond 2^24 FP32 would not tell the first from the mean.
    ([2**28 + 1, 2**28, 2**28, 2**28 - 1], [-1, 0, 0, 1]),
  ],
)
def test_bias_moves_by_the_sign_in_integers(counts, signs):
  bias = jnp.asarray([0.1, -0.2, 0.0, 0.3])
  new = router.updated_bias(bias, jnp.asarray(counts, jnp.int32), jnp.float32(0.01))
  np.testing.assert_allclose(
    new, np.asarray(bias) + 0.01 * np.asarray(signs), atol=1e-8
  )
  frozen = router.updated_bias(bias, jnp.asarray(counts, jnp.int32), jnp.float32(0))
  np.testing.assert_array_equal(frozen, bias)


def losses_by_hand(scores, experts, weights, config):
  """The formulas of DeepSeek-V3 (17-20) and V2 (23-31), loop by loop."""
  n, k = config.n_routed_experts, config.n_activated_experts
  devices, m = config.n_expert_groups, config.n_limited_groups
  total = 0.0
  for s_TE, e_TA in zip(scores.astype(np.float64), experts):
    t = len(s_TE)
    share = s_TE / s_TE.sum(-1, keepdims=True)
    p = share.mean(0)
    unbiased = np.argsort(-s_TE, axis=1, kind="stable")[:, :k]
    f_top = np.bincount(unbiased.ravel(), minlength=n) * n / (k * t)
    f = np.bincount(e_TA.ravel(), minlength=n) * n / (k * t)
    total += weights.sequence * (f_top * p).sum() + weights.expert * (f * p).sum()
    groups = np.split(np.arange(n), devices)
    total += weights.device * sum(f[g].mean() * p[g].sum() for g in groups)
    sent = [np.isin(e_TA, g).any(1).sum() * devices / (m * t) for g in groups]
    total += weights.communication * sum(c * p[g].sum() for c, g in zip(sent, groups))
  return total


@pytest.mark.parametrize("config", [SMALL, V2_LIKE], ids=["v3", "v2"])
@pytest.mark.parametrize("name", ["sequence", "expert", "device", "communication"])
def test_balance_losses_equal_numpy(config, name):
  weights = dataclasses.replace(BalanceConfig(0.0), **{name: 0.7})
  rng = np.random.default_rng(0)
  scores = rng.uniform(0.01, 1, (2, 30, 16)).astype(np.float32)
  if config.score_func == "softmax":
    scores /= scores.sum(-1, keepdims=True)
  flat = jnp.asarray(scores.reshape(-1, 16))
  experts = router.select_experts(flat, None, config).reshape(2, 30, -1)
  got = router.balance_loss(jnp.asarray(scores), experts, weights, config)
  expected = losses_by_hand(scores, np.asarray(experts), weights, config)
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_balance_loss_pushes_scores_of_busy_experts_down():
  config = dataclasses.replace(SMALL, n_expert_groups=1, n_limited_groups=1)
  scores = jnp.full((1, 8, 16), 0.3).at[:, :, :4].set(0.6)
  experts = jnp.tile(jnp.arange(4), (1, 8, 1))
  gradient = jax.grad(
    lambda s: router.balance_loss(s, experts, BalanceConfig(1.0), config)
  )(scores)
  assert (gradient[..., :4] > 0).all()
  assert (gradient[..., 4:] < 0).all()


def test_counts_are_integers_over_all_choices():
  experts = jnp.asarray([[0, 3], [3, 1], [3, 0]])
  counts = router.count_choices(experts, 5)
  assert counts.dtype == jnp.int32
  np.testing.assert_array_equal(counts, [2, 1, 0, 3, 0])
