"""Which experts a token goes to, with what weight, and how balance is kept.

DeepSeek-V3 report, sections 2.1.2 (sigmoid scores, bias that only selects, node
limit, sequence-wise loss) and DeepSeek-V2 report, section 2.2 (softmax scores, device
limit, three balance losses). Everything here is FP32.

Shape suffixes: B batch, T time, M=B*T tokens, D model, E experts, G groups, A active.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import BalanceConfig, ModelConfig
from deepseek_jax.model.layers import RouterBias, weight, widen
from kernels_pallas.choose import target_platform


class Router(nnx.Module):
  """Scores tokens against expert centroids."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    shape = (config.dim, config.n_routed_experts)
    self.weight = weight(key, shape, config.init_std, high_precision=True)
    if config.use_router_bias:
      self.bias = RouterBias(
        jnp.zeros((config.n_routed_experts,), jnp.float32),
        spec=P(),
        high_precision=True,
      )
    self.config = config

  def __call__(self, x_MD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns scores [M, E], chosen experts [M, A] and their gates [M, A]."""
    logits_ME = logits(x_MD, self.weight[...])
    if self.config.score_func == "sigmoid":
      scores_ME = jax.nn.sigmoid(logits_ME)
    else:
      scores_ME = jax.nn.softmax(logits_ME, axis=-1)
    bias_E = self.bias[...] if self.config.use_router_bias else None
    experts_MA = select_experts(scores_ME, bias_E, self.config)
    return scores_ME, experts_MA, gate_weights(scores_ME, experts_MA, self.config)


def logits(x_MD: jax.Array, weight_DE: jax.Array) -> jax.Array:
  """FP32 products [M, E] of tokens, of any dtype, and the router's FP32 weight.

  A GPU multiplies FP32 outside its tensor cores. They take three BF16 terms of an FP32
  value, which hold all of its bits; of products with tokens in BF16 none is left out,
  of those of two FP32 values (tokens' gradient) the ones below 2^-24.
  """
  precision = jax.lax.Precision.HIGHEST
  if target_platform() == "gpu" and x_MD.dtype == jnp.bfloat16:
    precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6
  return jnp.matmul(widen(x_MD), weight_DE, precision=precision)


def select_experts(
  scores_ME: jax.Array, bias_E: jax.Array | None, config: ModelConfig
) -> jax.Array:
  """The top experts by biased score within the best groups; ties go to the lowest.

  A group is worth the sum of its two best biased scores (V3) or its best one (V2).
  Experts of other groups are out of the question, whatever the sign of their score.
  """
  biased_ME = jax.lax.stop_gradient(scores_ME)
  if bias_E is not None:
    biased_ME = biased_ME + bias_E
  groups, kept = config.n_expert_groups, config.n_limited_groups
  if kept < groups:
    grouped = biased_ME.reshape(len(biased_ME), groups, -1)  # [M, G, E/G]
    if config.group_score == "top2_sum":
      worth_MG = jax.lax.top_k(grouped, 2)[0].sum(-1)
    else:
      worth_MG = grouped.max(-1)
    best = jax.lax.top_k(worth_MG, kept)[1]
    in_MG = (best[:, :, None] == jnp.arange(groups)).any(axis=1)
    biased_ME = jnp.where(in_MG[..., None], grouped, -jnp.inf).reshape(biased_ME.shape)
  return jax.lax.top_k(biased_ME, config.n_activated_experts)[1]


def gate_weights(
  scores_ME: jax.Array, experts_MA: jax.Array, config: ModelConfig
) -> jax.Array:
  """Unbiased scores of the chosen experts, normalised if so configured, scaled."""
  gates_MA = jnp.take_along_axis(scores_ME, experts_MA, axis=1)
  if config.norm_topk_prob:
    total = gates_MA.sum(-1, keepdims=True) + config.norm_topk_epsilon
    gates_MA = gates_MA / total
  return gates_MA * config.route_scale


def count_choices(experts_MA: jax.Array, n_experts: int) -> jax.Array:
  """How many tokens chose each expert, int32 [E]."""
  return (experts_MA[..., None] == jnp.arange(n_experts)).sum((0, 1), dtype=jnp.int32)


def updated_bias(bias_E: jax.Array, counts_E: jax.Array, rate: jax.Array) -> jax.Array:
  """bias + rate * sign(mean count - count), exactly: the comparison is in integers.

  Args:
    bias_E: FP32, [..., E].
    counts_E: tokens of the whole global batch that chose each expert, [..., E].
    rate: gamma; 0 leaves the bias as it is.
  """
  total = counts_E.sum(-1, keepdims=True)
  quotient, rest = jnp.divmod(total, counts_E.shape[-1])
  below_mean = (counts_E < quotient) | ((counts_E == quotient) & (rest > 0))
  sign = jnp.where(below_mean, 1, jnp.where(counts_E > quotient, -1, 0))
  return bias_E + rate * sign.astype(bias_E.dtype)


def balance_loss(
  scores_BTE: jax.Array,
  experts_BTA: jax.Array,
  weights: BalanceConfig,
  config: ModelConfig,
) -> jax.Array:
  """The configured balance losses, summed over the sequences given.

  Gradients flow through the mean scores P only. V3's `sequence` loss counts the
  best unbiased scores without a group limit, as its equation 18 is printed; V2's
  three count the experts that were chosen.
  """
  total = jnp.zeros((), scores_BTE.dtype)
  t, n = scores_BTE.shape[1], config.n_routed_experts
  active, groups = config.n_activated_experts, config.n_expert_groups
  if config.score_func == "sigmoid":
    share_BTE = scores_BTE / (scores_BTE.sum(-1, keepdims=True) + 1e-20)
  else:
    share_BTE = scores_BTE
  share_BE = share_BTE.mean(1)  # P_i

  def frequency(chosen_BTA):  # f_i
    hits = (chosen_BTA[..., None] == jnp.arange(n)).sum((1, 2))
    return hits.astype(share_BE.dtype) * (n / (active * t))

  if weights.sequence:
    unbiased = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE), active)[1]
    total += weights.sequence * (frequency(unbiased) * share_BE).sum()
  if weights.expert or weights.device:
    f_BE = frequency(experts_BTA)
    total += weights.expert * (f_BE * share_BE).sum()
  if weights.device or weights.communication:
    by_device = share_BE.reshape(len(share_BE), groups, -1).sum(-1)
  if weights.device:
    f_BG = f_BE.reshape(len(f_BE), groups, -1).mean(-1)
    total += weights.device * (f_BG * by_device).sum()
  if weights.communication:
    devices_BTA = experts_BTA // (n // groups)
    sent = (devices_BTA[..., None] == jnp.arange(groups)).any(2).sum(1)  # [B, G]
    f_BG = sent.astype(share_BE.dtype) * (groups / (config.n_limited_groups * t))
    total += weights.communication * (f_BG * by_device).sum()
  return total


def entropy(scores_ME: jax.Array) -> jax.Array:
  """Entropy of the normalised scores, nats, summed over tokens."""
  p = scores_ME / (scores_ME.sum(-1, keepdims=True) + 1e-20)
  return -(p * jnp.log(p + 1e-20)).sum()
