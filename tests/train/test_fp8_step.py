"""FP8 steps with all that training combines: MTP, experts, accumulation, remat, ZeRO-1.

Meshes and accumulation agree to the rounding of BF16 and FP8, no better: XLA keeps
BF16 intermediates wider where it fuses them, which moves an FP8 code or a router's
choice here and there, and weight gradients are tiled along 128 tokens of one device.
Test_step.py has the same in FP32 and tight. A lost or doubled part of a gradient would
change its norm and direction by far more than is allowed here.
"""

import dataclasses
import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import Config
from deepseek_jax.fp8_config import Fp8Config
from deepseek_jax.mesh import make_mesh
from deepseek_jax.parallel import dispatch
from deepseek_jax.precision import hopper
from deepseek_jax.train import step
from kernels_pallas import choose
from tests.train import test_step
from tests.train.test_step import make_config, run, tokens

MODEL = dataclasses.replace(test_step.MODEL, n_layers=1, n_dense_layers=0)
BATCHES = [{"tokens": tokens(0)}] * 10


@functools.cache
def single(precision: str):
  """Ten steps on one batch, on one device."""
  return run(make_config(precision=precision, model=MODEL), BATCHES)[1]


def test_all_at_once_agrees_with_one_device():
  """FP8, MTP, ZeRO-1, experts over 2 x 2 of 8 devices, accumulation and remat."""
  config = make_config((1, 2, 2, 2), 2, MODEL, "fp8", remat="deepseek")
  assert config.model.n_mtp_layers == 1
  _, (ours, after) = run(config, BATCHES[:2])
  plain, plain_after = single("fp8")[:2]
  for name in ("loss", "mtp_loss", "balance_loss", "entropy"):
    np.testing.assert_allclose(ours[name], plain[name], rtol=3e-3, err_msg=name)
  np.testing.assert_allclose(ours["grad_norm"], plain["grad_norm"], rtol=0.02)
  assert np.abs(ours["counts"] - plain["counts"]).sum() <= 0.03 * ours["counts"].sum()
  # After an update of all weights by the gradient that the ranks put together.
  np.testing.assert_allclose(after["loss"], plain_after["loss"], rtol=5e-3)


def test_near_bf16_and_falling_as_it_does():
  fp8, bf16 = single("fp8"), single("bf16")
  for name in ("loss", "mtp_loss"):
    assert fp8[0][name] != bf16[0][name]
    np.testing.assert_allclose(fp8[0][name], bf16[0][name], rtol=5e-3)
  np.testing.assert_allclose(fp8[0]["grad_norm"], bf16[0]["grad_norm"], rtol=0.05)
  assert fp8[-1]["loss"] < 0.6 * fp8[0]["loss"]
  # A model of width 32 at this learning rate: other roundings part by as much.
  losses = [[m["loss"] for m in curve] for curve in (fp8, bf16)]
  np.testing.assert_allclose(*losses, rtol=0.1)


def test_the_optimizer_state_is_split_over_all_eight_devices():
  mesh = make_mesh(1, 2, 2, node=2)
  state = step.abstract_state(make_config((1, 2, 2, 2), precision="fp8"), mesh)
  for name in ("moe_blocks.ffn.experts.w13", "mtp.0.eh_proj", "embed.weight"):
    for part in (state.params, state.mu, state.nu):
      shape, sharding = part[name].shape, part[name].sharding
      assert math.prod(sharding.shard_shape(shape)) == math.prod(shape) // 8, name


def weights(config: Config):
  """The compute weights of a fresh model on one device."""
  mesh = make_mesh(devices=jax.devices()[:1])
  blueprint = step.Blueprint.of(config, mesh)
  model = jax.eval_shape(blueprint.compute_weights, step.abstract_state(config, mesh))
  return step.named_variables(model)


def test_what_is_quantised_and_what_is_not():
  fp8 = jnp.float8_e4m3fn
  for name, variable in weights(make_config(precision="fp8")).items():
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(variable)}
    last = name.split(".")[-1]
    if last in ("wq_a", "wq_b", "wkv_a", "wkv_b", "wo", "w13", "w2"):
      assert dtypes == {jnp.dtype(fp8), jnp.dtype(jnp.float32)}, name
    elif "router" in name or "norm" in name:
      assert dtypes == {jnp.dtype(jnp.float32)}, name
    else:
      assert last in ("weight", "eh_proj"), name
      assert dtypes == {jnp.dtype(jnp.bfloat16)}, name


def test_ablations_want_the_emulation():
  config = make_config(precision="fp8_emulated")
  ablation = Fp8Config(scales="tensor", promotion=False)
  with pytest.raises(
    ValueError, match=r"precision=fp8 does not compute fp8\.scales=tensor, fp8\.prom"
  ):
    Config(precision="fp8", fp8=ablation, model=config.model, train=config.train)
  Config(precision="fp8_emulated", fp8=ablation, model=config.model, train=config.train)


def test_lowers_for_cuda_with_its_kernels(monkeypatch):
  """Remat, scans over layers and micro-batches, and shard_map take every kernel."""
  for module in (choose, hopper, dispatch):
    monkeypatch.setattr(module, "target_platform", lambda: "gpu")
  model = dataclasses.replace(
    MODEL,
    dim=128,
    inter_dim=128,
    moe_inter_dim=128,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
  )
  config = make_config((1, 1, 2), 2, model, "fp8", remat="deepseek", seq_len=32)
  devices = make_mesh(expert=2, devices=jax.devices()[:2])
  shape = (2, config.train.micro_batch_size * 2, 33)
  batch = jax.ShapeDtypeStruct(shape, np.int32, sharding=step.batch_sharding(devices))
  run = step.make_train_step(config, devices, 2.0)
  args = step.abstract_state(config, devices), {"tokens": batch}, test_step.SCALARS
  with warnings.catch_warnings():
    warnings.filterwarnings("error", "(?s).*computes it, slowly")  # instead of a kernel
    lowered = run.trace(*args).lower(lowering_platforms=("cuda",))
  # Products and quantisers of a layer and MTP's, forward and backward.
  assert lowered.as_text().count("mosaic_gpu_v2") > 100
