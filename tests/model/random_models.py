"""Models of a few thousand random parameters, none of them at a special value."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.layers import RouterBias, map_variables
from deepseek_jax.model.transformer import Transformer

MLA = ModelConfig(
  vocab_size=64,
  dim=32,
  inter_dim=48,
  moe_inter_dim=16,
  n_layers=3,
  n_dense_layers=1,
  n_heads=2,
  q_lora_rank=24,
  kv_lora_rank=16,
  qk_nope_head_dim=8,
  qk_rope_head_dim=8,
  v_head_dim=12,
  n_routed_experts=8,
  n_activated_experts=2,
  n_expert_groups=4,
  n_limited_groups=2,
  max_seq_len=256,
  original_seq_len=256,
  n_mtp_layers=0,
)
DIRECT = dataclasses.replace(MLA, q_lora_rank=0)
MHA = dataclasses.replace(
  DIRECT, kv_lora_rank=0, qk_nope_head_dim=0, rope_interleaved=False
)
# With 16 positions before the extension, tests of short texts see what YaRN changes.
YARN = dataclasses.replace(MLA, original_seq_len=16)
MHA_YARN = dataclasses.replace(MHA, original_seq_len=16)
KINDS = {
  "mla": MLA,
  "direct": DIRECT,
  "mha": MHA,
  "mla_yarn": YARN,
  "mha_yarn": MHA_YARN,
}


def randomise(module, seed: int):
  """The module with every parameter drawn anew, outputs of the order of one.

  Matrices keep the variance of what passes through them, norms lie around 1, and
  router biases are large enough to change choices.
  """
  rng = np.random.default_rng(seed)

  def draw(variable):
    noise = rng.normal(size=variable.shape)
    if isinstance(variable, RouterBias):
      value = 0.2 * noise
    elif variable.get_metadata().get("norm"):
      value = 1 + 0.2 * noise
    else:
      value = noise / module.config.dim**0.5
    return variable.replace(jnp.asarray(value, jnp.float32))

  return map_variables(draw, module)


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
  blank = jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))
  return randomise(blank, seed)
