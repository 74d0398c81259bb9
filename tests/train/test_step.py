"""The step: the same on every mesh and accumulation, and harmless when it fails."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import (
  BalanceConfig,
  Config,
  MeshConfig,
  ModelConfig,
  ScheduleConfig,
  TrainConfig,
)
from deepseek_jax.mesh import make_mesh
from deepseek_jax.presets import TINY
from deepseek_jax.train import step
from deepseek_jax.train.metrics import copies_per_token

MODEL = dataclasses.replace(
  TINY,
  vocab_size=64,
  dim=32,
  inter_dim=48,
  moe_inter_dim=16,
  n_layers=2,
  n_heads=2,
  q_lora_rank=16,
  kv_lora_rank=16,
  qk_nope_head_dim=8,
  qk_rope_head_dim=8,
  v_head_dim=8,
  n_routed_experts=8,
  n_activated_experts=2,
  max_seq_len=64,
  init_std=0.1,
)
# One layer, for what more layers and MTP would only take longer to compile for.
SMALL = dataclasses.replace(MODEL, n_layers=1, n_dense_layers=0, n_mtp_layers=0)
ROWS, SEQ = 16, 12
SCALARS = step.Scalars(np.float32(1e-2), np.float32(1e-2), np.float32(0.3))
CONSTANT = ((math.inf, "constant", 1.0),)


def make_config(
  mesh: tuple[int, ...] = (1, 1, 1),  # pipeline, data, expert, node
  micros: int = 1,
  model: ModelConfig = MODEL,
  precision: str = "fp32",
  **train,
) -> Config:
  micro = ROWS // (math.prod(mesh) * micros)
  settings = {
    "batch_size": ROWS,
    "micro_batch_size": micro,
    "seq_len": SEQ,
    "moment_dtype": "float32",
    "remat": "none",
    "balance": BalanceConfig(sequence=1e-2),
    "schedule": ScheduleConfig(batch_size=CONSTANT),
  }
  return Config(
    precision=precision,
    model=model,
    mesh=MeshConfig(*mesh),
    train=TrainConfig(**(settings | train)),
  )


def tokens(seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 64, (ROWS, SEQ + 1)).astype(np.int32)


@functools.cache
def initial(model: ModelConfig, moment_dtype: str) -> step.TrainState:
  """The first state, made once; `test_abstract_state...` makes it on a mesh too."""
  config = make_config(model=model, moment_dtype=moment_dtype)
  state = step.init_state(config, make_mesh(devices=jax.devices()[:1]))
  return jax.tree.map(np.asarray, state)


def run(config: Config, batches=None, capacity: float = math.inf, scalars=SCALARS):
  """Steps on the batches: the last state and every step's metrics, as NumPy."""
  m = config.mesh
  n = m.data * m.node * m.expert
  mesh = make_mesh(1, m.data, m.expert, jax.devices()[:n], node=m.node)
  state = jax.tree.map(
    lambda x, like: jax.device_put(x, like.sharding),
    initial(config.model, config.train.moment_dtype),
    step.abstract_state(config, mesh),
  )
  train_step = step.make_train_step(config, mesh, capacity)
  rows = config.train.micro_batch_size * n
  out = []
  for batch in (
    batches if batches is not None else [{"tokens": tokens(s)} for s in (0, 1)]
  ):
    shaped = {k: v.reshape(-1, rows, SEQ + 1) for k, v in batch.items()}
    placed = jax.device_put(shaped, step.batch_sharding(mesh))
    state, metrics = train_step(state, placed, scalars)
    out.append(jax.tree.map(np.asarray, metrics))
  return jax.tree.map(np.asarray, state), out


@functools.cache
def single():
  return run(make_config())


def assert_same(a, b):
  (state_a, metrics_a), (state_b, metrics_b) = a, b
  for x, y in zip(metrics_a, metrics_b):
    np.testing.assert_array_equal(x["counts"], y["counts"])
    for name in ("loss", "mtp_loss", "balance_loss", "grad_norm", "entropy"):
      # FP32 sums over 192 tokens in another order.
      np.testing.assert_allclose(x[name], y[name], rtol=2e-6, err_msg=name)
  for name, bias in state_a.bias.items():
    np.testing.assert_array_equal(bias, state_b.bias[name], err_msg=name)
  for name, value in state_a.mu.items():
    # Gradients, element by element, against the parameter's largest. The second
    # step's see parameters that the first moved apart by rounding.
    bound = 1e-4 * np.abs(value).max()
    np.testing.assert_allclose(
      state_b.mu[name], value, rtol=0, atol=bound, err_msg=name
    )
  for name, value in state_a.params.items():
    # Adam divides by the gradient's own size, so rounding of a gradient near zero may
    # move a parameter by a visible share of a step of 1e-2.
    moved = np.abs(state_b.params[name] - value)
    assert np.quantile(moved, 0.99) < 1e-5, name
    assert moved.max() < 2e-3, name


@pytest.mark.parametrize("mesh", [(1, 2, 4), (1, 8, 1), (1, 1, 8), (1, 1, 4, 2)])
def test_meshes_agree(mesh):
  config = make_config(mesh)
  found = run(config)
  assert_same(single(), found)
  assert copies(config, found).keys() == {
    axis for axis in ("node", "expert") if getattr(config.mesh, axis) > 1
  }
  for sent in copies(config, found).values():
    assert 1 < sent <= config.model.n_activated_experts


def copies(config, found):
  return copies_per_token(config.mesh, found[1][0]["copies"])


def test_accumulation_with_full_recomputation_agrees():
  assert_same(single(), run(make_config(micros=4, remat="full")))


def test_accumulation_on_a_mesh_with_bounded_dispatch_and_remat_agrees():
  config = make_config((1, 2, 2), micros=2, remat="deepseek")
  assert_same(single(), run(config, capacity=2.5))


def test_documents_kept_apart_agree_on_a_mesh():
  segments = np.sort(np.random.default_rng(0).integers(0, 3, (ROWS, SEQ + 1)))
  batch = [{"tokens": tokens(), "segments": segments.astype(np.int32)}]
  one = run(make_config(model=SMALL), batch)
  assert_same(one, run(make_config((1, 2, 4), model=SMALL), batch))
  expected = (segments[:, 1:] == segments[:, :-1]).sum()
  assert one[1][0]["tokens"] == expected < ROWS * SEQ


def test_a_batch_balanced_only_globally_leaves_the_bias():
  """Each rank sends all it has to its own two experts; together they balance."""
  model = dataclasses.replace(
    MODEL, n_layers=1, n_dense_layers=0, n_mtp_layers=0, n_expert_groups=1,
    n_limited_groups=1, n_shared_experts=0,
  )  # fmt: skip
  config = make_config((1, 1, 4), model=model)
  mesh = make_mesh(1, 1, 4, devices=jax.devices()[:4])
  state = step.init_state(config, mesh)
  # Attention adds nothing and tokens 4k..4k+3 point at experts 2k and 2k+1.
  params = dict(state.params)
  embed = np.zeros((64, 32), np.float32)
  router = np.zeros((1, 32, 8), np.float32)
  for rank in range(4):
    embed[4 * rank : 4 * rank + 4, rank] = 1
    router[0, rank, 2 * rank : 2 * rank + 2] = 1
  replaced = {
    "embed.weight": embed,
    "moe_blocks.ffn.router.weight": router,
    "moe_blocks.attn.wo": np.zeros(params["moe_blocks.attn.wo"].shape, np.float32),
  }
  for name, value in replaced.items():
    params[name] = jax.device_put(value, params[name].sharding)
  state = dataclasses.replace(state, params=params)
  batch = np.repeat(np.arange(16) // 4 * 4, SEQ + 1).reshape(1, ROWS, SEQ + 1)
  placed = {"tokens": jax.device_put(batch.astype(np.int32), step.batch_sharding(mesh))}
  state, metrics = step.make_train_step(config, mesh, math.inf)(state, placed, SCALARS)
  np.testing.assert_array_equal(metrics["counts"], np.full((1, 8), ROWS * SEQ // 4))
  np.testing.assert_array_equal(state.bias["moe_blocks.ffn.router.bias"], 0)


def test_bias_moves_once_a_step_however_many_micro_batches():
  state, _ = run(make_config(micros=4), [{"tokens": tokens()}])
  for bias in state.bias.values():
    assert set(np.unique(np.abs(bias))) <= {np.float32(0), np.float32(1e-2)}
    assert np.abs(bias).max() > 0


def test_gamma_zero_freezes_the_bias():
  frozen = dataclasses.replace(SCALARS, bias_update_rate=np.float32(0))
  state, _ = run(make_config(), scalars=frozen)
  assert all(not bias.any() for bias in state.bias.values())


def assert_untouched(config, state):
  fresh = initial(config.model, config.train.moment_dtype)
  jax.tree.map(np.testing.assert_array_equal, fresh, state)


def test_an_overflow_is_reported_and_changes_nothing():
  config = make_config((1, 1, 4), model=SMALL)
  state, (metrics,) = run(config, [{"tokens": tokens()}], capacity=0.3)
  assert metrics["overflow"]
  assert not metrics["applied"]
  assert_untouched(config, state)


def test_a_non_finite_step_changes_nothing():
  config = make_config()
  poison = dataclasses.replace(SCALARS, mtp_weight=np.float32(np.nan))
  state, (metrics,) = run(config, [{"tokens": tokens()}], scalars=poison)
  assert not metrics["finite"]
  assert not metrics["applied"]
  assert_untouched(config, state)


def test_loss_falls_in_bf16_with_bf16_moments():
  config = make_config((1, 2, 2), precision="bf16", moment_dtype="bfloat16")
  state, metrics = run(config, [{"tokens": tokens()}] * 12)
  assert {str(x.dtype) for x in state.nu.values()} == {"bfloat16"}
  assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5
  reference = single()[1][0]
  # BF16 has 8 bits; losses average over 192 tokens.
  np.testing.assert_allclose(metrics[0]["loss"], reference["loss"], rtol=5e-3)


@pytest.mark.parametrize("kind", ["dense", "softmax_mha", "mtp2"])
def test_other_shapes_train(kind):
  model = {
    "dense": dataclasses.replace(MODEL, n_dense_layers=2, n_mtp_layers=0),
    "softmax_mha": dataclasses.replace(
      SMALL, q_lora_rank=0, kv_lora_rank=0, qk_nope_head_dim=0, rope_interleaved=False,
      score_func="softmax", use_router_bias=False, norm_topk_prob=False,
    ),
    "mtp2": dataclasses.replace(SMALL, n_mtp_layers=2),
  }[kind]  # fmt: skip
  _, metrics = run(make_config(model=model), [{"tokens": tokens()}] * 6)
  assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1
  layers = model.n_moe_layers + model.n_mtp_layers
  assert metrics[0]["counts"].shape == (layers, 8)
  np.testing.assert_array_equal(metrics[0]["counts"].sum(-1), 2 * ROWS * SEQ)


def test_evaluation_equals_the_training_loss():
  config = make_config((1, 2, 4))
  mesh = make_mesh(1, 2, 4)
  state = step.init_state(config, mesh)
  shaped = tokens().reshape(-1, ROWS, SEQ + 1)
  batch = {"tokens": jax.device_put(shaped, step.batch_sharding(mesh))}
  metrics = step.make_eval_step(config, mesh, math.inf)(state, batch)
  expected = single()[1][0]
  for name in ("loss", "mtp_loss"):
    np.testing.assert_allclose(metrics[name], expected[name], rtol=2e-6)
  np.testing.assert_array_equal(metrics["counts"], expected["counts"])


def test_abstract_state_has_the_shapes_of_the_real_one():
  config, mesh = make_config((1, 2, 4)), make_mesh(1, 2, 4)
  real, abstract = step.init_state(config, mesh), step.abstract_state(config, mesh)
  for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(abstract)):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
  single_device = initial(config.model, config.train.moment_dtype)
  jax.tree.map(np.testing.assert_array_equal, real, single_device)
  split = real.params["embed.weight"]
  assert split.addressable_shards[0].data.size == split.size // 8
  assert jnp.issubdtype(real.step.dtype, jnp.integer)
