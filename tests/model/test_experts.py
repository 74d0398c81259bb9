"""Routed experts over ranks are those of one device, in FP8 to the last bit.

Rows of an expert stand by source rank and token, which is the order of one device, so
even tiles along rows are the same ones.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.mesh import EXPERT_AXES, make_mesh, split_axes
from deepseek_jax.model.experts import Experts
from deepseek_jax.model.layers import (
  cast_for_compute,
  gradient_targets,
  quantize_for_compute,
  with_gradient_targets,
)
from deepseek_jax.model.transformer import SAVED
from deepseek_jax.parallel.dispatch import make_plan
from deepseek_jax.precision.tiles import Recipe
from deepseek_jax.presets import TINY

CONFIG = dataclasses.replace(
  TINY, dim=160, moe_inter_dim=32, n_routed_experts=8, n_activated_experts=2,
  init_std=0.1,
)  # fmt: skip
TOKENS = 96


def inputs():
  """Weights in BF16, tokens, gates, choices (rank 0's experts liked best), dy."""
  keys = jax.random.split(jax.random.key(0), 5)
  experts = cast_for_compute(Experts(CONFIG, keys[0]), jnp.bfloat16)
  x, dy = (jax.random.normal(k, (TOKENS, CONFIG.dim), jnp.bfloat16) for k in keys[1:3])
  likes = jax.random.gumbel(keys[3], (TOKENS, 8)).at[:, :2].add(1.0)
  chosen = jax.lax.top_k(likes, 2)[1].astype(jnp.int32)
  return experts, x, jax.random.uniform(keys[4], (TOKENS, 2)), chosen, dy


@functools.cache
def run(ranks: int, fp8: bool, remat: bool, nodes: int = 1):
  """Output and the gradients of tokens, gates and both weights."""
  mesh = make_mesh(expert=ranks // nodes, node=nodes, devices=jax.devices()[:ranks])
  axes = split_axes(mesh)

  def body(experts, x, gates, chosen, dy):
    weights = quantize_for_compute(experts, Recipe()) if fp8 else experts

    def forward(targets, x, gates):
      module = with_gradient_targets(weights, targets)
      plan = make_plan(chosen, n_experts=8, row_multiple=module.row_multiple, axes=axes)
      return module(x, gates, plan)

    if remat:
      policy = jax.checkpoint_policies.save_only_these_names(*SAVED)
      forward = jax.checkpoint(forward, policy=policy)
    y, pull = jax.vjp(forward, gradient_targets(weights), x, gates)
    d_weights, dx, d_gates = pull(dy)
    return y, dx, d_gates, d_weights.w13[...], d_weights.w2[...]

  spec = P(EXPERT_AXES)
  step = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  return jax.tree.map(np.asarray, jax.jit(step)(*inputs()))


NAMES = ("y", "dx", "d_gates", "d_w13", "d_w2")


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_ranks_agree_with_one_device(fp8, remat):
  one, four = run(1, fp8, False), run(4, fp8, remat)
  for name, a, b in zip(NAMES, one, four):
    if fp8:
      np.testing.assert_array_equal(a, b, err_msg=name, strict=True)
    else:
      # BF16 rounds a token's rows on their way home and sums weight gradients in
      # blocks of rows whose size depends on how many rows there are.
      a, b = a.astype(np.float32), b.astype(np.float32)
      bound = 2**-7 * np.abs(a).max()
      np.testing.assert_allclose(b, a, rtol=0, atol=bound, err_msg=name)


def test_two_nodes_agree_with_one_device():
  """Rows stand in another order within an expert, so tiles along rows are others."""
  for name, a, b in zip(NAMES, run(1, True, False), run(8, True, False, nodes=2)):
    a, b = a.astype(np.float32), b.astype(np.float32)
    bound = 2**-4 * np.abs(a).max()
    np.testing.assert_allclose(b, a, rtol=0, atol=bound, err_msg=name)


def test_kept_codes_survive_recomputation():
  """Codes above 240, E4M3's top binade, which `reduce_precision` calls infinite."""
  for name, plain, again in zip(NAMES, run(1, True, False), run(1, True, True)):
    assert np.isfinite(plain.astype(np.float32)).all(), name
    np.testing.assert_array_equal(plain, again, err_msg=name)


def test_fp8_is_near_bf16():
  for name, a, b in zip(NAMES, run(1, True, False), run(1, False, False)):
    x, y = np.float64(a.astype(np.float32)), np.float64(b.astype(np.float32))
    assert 1e-4 < 1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum()) < 5e-3, name
