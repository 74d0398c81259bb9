"""Cross entropy without a whole logit matrix, and the sum that training minimises.

DeepSeek-V3 report, sections 2.1.2 (balance) and 2.2 (MTP: L = L_main + lambda / D *
sum of L_k, each over the same 1/T).

Shape suffixes: B batch, T time, M tokens, D model, V vocabulary, L layers, E experts,
S axes of experts.
"""

import dataclasses

import jax
import jax.numpy as jnp

from deepseek_jax.model.layers import widen
from deepseek_jax.model.moe import Execution, RoutingStats
from deepseek_jax.model.transformer import Transformer

LOGITS_AT_ONCE = 2**25  # elements of the largest logit matrix: 128 MiB in FP32


@jax.custom_vjp
def cross_entropy(
  hidden_MD: jax.Array, head_DV: jax.Array, targets_M: jax.Array, weights_M: jax.Array
) -> jax.Array:
  """Sum of weights * -log softmax(hidden @ head)[target], FP32 scalar.

  Logits exist for a chunk of tokens at a time, in FP32. Under differentiation the
  gradients are made in the same pass and the head's accumulates in FP32.
  """

  def chunk(total, inputs):
    return total + _chunk_loss(head_DV, *inputs)[0], None

  zero = jnp.zeros((), widen(hidden_MD).dtype)
  return jax.lax.scan(chunk, zero, _chunks(hidden_MD, head_DV, targets_M, weights_M))[0]


def _chunks(hidden_MD, head_DV, targets_M, weights_M):
  m = hidden_MD.shape[0]
  size = max(1, min(m, LOGITS_AT_ONCE // head_DV.shape[1]))
  size = -(-m // -(-m // size))  # equal chunks
  pad = -m % size

  def split(x):
    x = jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(-1, size, *x.shape[1:])

  return split(hidden_MD), split(targets_M), split(weights_M)


def _chunk_loss(head_DV, hidden_MD, targets_M, weights_M):
  logits_MV = jnp.matmul(
    hidden_MD, head_DV, preferred_element_type=widen(hidden_MD).dtype
  )
  log_z_M = jax.nn.logsumexp(logits_MV, axis=-1)
  hit_M = jnp.take_along_axis(logits_MV, targets_M[:, None], axis=1)[:, 0]
  return ((log_z_M - hit_M) * weights_M).sum(), logits_MV, log_z_M


def _cross_entropy_fwd(hidden_MD, head_DV, targets_M, weights_M):
  wide = widen(hidden_MD).dtype

  def chunk(carry, inputs):
    total, d_head_DV = carry
    hidden_MD, targets_M, weights_M = inputs
    loss, logits_MV, log_z_M = _chunk_loss(head_DV, *inputs)
    probs_MV = jnp.exp(logits_MV - log_z_M[:, None])
    hit_MV = targets_M[:, None] == jnp.arange(head_DV.shape[1])
    d_logits = ((probs_MV - hit_MV) * weights_M[:, None]).astype(hidden_MD.dtype)
    d_head_DV += jnp.matmul(hidden_MD.T, d_logits, preferred_element_type=wide)
    return (total + loss, d_head_DV), jnp.matmul(d_logits, head_DV.T)

  start = jnp.zeros((), wide), jnp.zeros(head_DV.shape, wide)
  chunks = _chunks(hidden_MD, head_DV, targets_M, weights_M)
  (total, d_head_DV), d_hidden = jax.lax.scan(chunk, start, chunks)
  d_hidden_MD = d_hidden.reshape(-1, hidden_MD.shape[1])[: len(hidden_MD)]
  return total, (d_hidden_MD, d_head_DV, jnp.zeros((0,), head_DV.dtype))


def _cross_entropy_bwd(residuals, g):
  d_hidden_MD, d_head_DV, like = residuals
  d_hidden_MD = (g * widen(d_hidden_MD)).astype(d_hidden_MD.dtype)
  return d_hidden_MD, (g * d_head_DV).astype(like.dtype), None, None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class LossParts:
  """Sums over the tokens given (not means), and what routing did."""

  main: jax.Array  # nats
  mtp: jax.Array  # nats, summed over depths and divided by their number
  balance: jax.Array  # weighted, summed over sequences
  counts_LE: jax.Array  # int32
  entropy_L: jax.Array  # nats, summed over tokens
  overflow: jax.Array  # bool
  copies_LS: jax.Array  # int32: tokens sent along each axis of experts


def loss_weights(segments_BT: jax.Array | None, shape: tuple, ahead: int) -> jax.Array:
  """1 where the target `ahead` places on exists in the same document, else 0.

  Args:
    segments_BT: documents of the T+1 tokens of each sequence, or None.
    shape: [B, T+1].
    ahead: 1 for the main loss, 1 + k for MTP depth k.

  Returns:
    FP32 [B, T].
  """
  b, t = shape[0], shape[1] - 1
  valid = jnp.broadcast_to(jnp.arange(t) + ahead <= t, (b, t))
  if segments_BT is not None:
    later = jnp.pad(segments_BT, ((0, 0), (0, ahead - 1)))[:, ahead:]
    valid &= segments_BT[:, :-1] == later
  return valid.astype(jnp.float32)


def loss_parts(
  model: Transformer,
  tokens_BT: jax.Array,
  segments_BT: jax.Array | None,
  execution: Execution,
) -> LossParts:
  """All losses of one micro-batch, as sums.

  Args:
    model: in compute precision.
    tokens_BT: int32 [B, T+1]: inputs and, one place on, their targets.
    segments_BT: document of each token, or None to look across documents.
  """
  inputs, shape = tokens_BT[:, :-1], tokens_BT.shape
  segments = None if segments_BT is None else segments_BT[:, :-1]
  out = model(inputs, segments, execution)
  head_DV = model.head_weight()

  def nats(normed_BTD, ahead):
    targets = jnp.pad(tokens_BT, ((0, 0), (0, ahead - 1)))[:, ahead:]
    weights = loss_weights(segments_BT, shape, ahead)
    flat = normed_BTD.reshape(-1, normed_BTD.shape[-1])
    return cross_entropy(
      flat, head_DV, targets.reshape(-1), weights.reshape(-1).astype(widen(flat).dtype)
    )

  main = nats(model.norm(out.hidden_BTD), 1)
  states, ahead_stats = model.look_ahead(
    out.hidden_BTD, tokens_BT[:, 1:], segments, execution
  )
  mtp = sum((nats(s, k + 2) for k, s in enumerate(states)), jnp.zeros_like(main))
  stats = _join(out.stats, ahead_stats, model.config.n_routed_experts)
  return LossParts(
    main=main,
    mtp=mtp / max(len(states), 1),
    balance=stats.balance.sum(),
    counts_LE=stats.counts_E,
    entropy_L=stats.entropy,
    overflow=stats.overflow.any(),
    copies_LS=stats.copies_S,
  )


def _join(main: RoutingStats | None, ahead: RoutingStats | None, experts: int):
  """Routing of all layers, those of MTP last."""
  present = [stats for stats in (main, ahead) if stats is not None]
  if not present:
    none = jnp.zeros((0,))
    return RoutingStats(
      jnp.zeros((0, experts), jnp.int32),
      none,
      none,
      none.astype(bool),
      jnp.zeros((0, 0), jnp.int32),
    )
  return jax.tree.map(lambda *xs: jnp.concatenate(xs), *present)
