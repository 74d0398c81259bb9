"""Multi-head latent attention, naive and absorbed (DeepSeek-V2 report 2.1, V3 2.1.1).

Keys and values of all heads come from one latent vector a token, which with one
shared rotary key is all that generation keeps. Training expands the latent (naive);
decoding folds the expansion into query and output (absorbed). Both forms stand here
side by side and are equal. `MultiHeadAttention` is the plain form of DeepSeekMoE.

A layer's cache is [B, S, L]: what one token leaves behind, L = `config.cache_dim`.

Shape suffixes: B batch, T query time, S key time, D model, H heads, Q query latent,
C key-value latent, N nope, R rope, K=N+R, U value dim, L cache.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.layers import RMSNorm, weight
from deepseek_jax.model.rope import rotate, softmax_scale
from deepseek_jax.precision.linear import linear


def attend(
  q_BTHK: jax.Array,
  k_BSHK: jax.Array,
  v_BSHU: jax.Array,
  scale: float,
  mask_BTS: jax.Array,
) -> jax.Array:
  """Softmax attention, scores and softmax in FP32; [B, T, H, U]."""
  wide = jnp.promote_types(q_BTHK.dtype, jnp.float32)
  scores = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK, preferred_element_type=wide)
  scores = jnp.where(mask_BTS[:, None], scores * scale, -jnp.inf)
  probs = jax.nn.softmax(scores, axis=-1).astype(v_BSHU.dtype)
  return jnp.einsum("bhts,bshu->bthu", probs, v_BSHU)


def causal_attend(
  q_BTHK: jax.Array,
  k_BTHK: jax.Array,
  v_BTHU: jax.Array,
  scale: float,
  segments_BT: jax.Array | None = None,
) -> jax.Array:
  """Each position sees itself and what came before, within its segment if given.

  16-bit inputs without segments run in cuDNN on a GPU; it wants values as wide as
  keys, so they are padded.
  """
  fused = (
    q_BTHK.dtype == jnp.bfloat16
    and segments_BT is None
    and jax.default_backend() == "gpu"
  )
  if fused:
    pad = q_BTHK.shape[-1] - v_BTHU.shape[-1]
    v_BTHK = jnp.pad(v_BTHU, ((0, 0), (0, 0), (0, 0), (0, pad)))
    out = jax.nn.dot_product_attention(
      q_BTHK, k_BTHK, v_BTHK, scale=scale, is_causal=True, implementation="cudnn"
    )
    return out[..., : v_BTHU.shape[-1]]
  t = q_BTHK.shape[1]
  mask = jnp.tril(jnp.ones((1, t, t), bool))
  if segments_BT is not None:
    mask &= segments_BT[:, :, None] == segments_BT[:, None, :]
  return attend(q_BTHK, k_BTHK, v_BTHU, scale, mask)


def write_cache(cache_BSL: jax.Array, new_BTL: jax.Array, positions_BT: jax.Array):
  """The cache with `new` at `positions`; positions outside the cache write nothing."""
  rows = jnp.arange(cache_BSL.shape[0])[:, None]
  return cache_BSL.at[rows, positions_BT].set(
    new_BTL.astype(cache_BSL.dtype), mode="drop"
  )


class LatentAttention(nnx.Module):
  """MLA, with (`q_lora_rank > 0`) or without query compression."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    c, std = config, config.init_std
    d, h = c.dim, c.n_heads
    keys = jax.random.split(key, 5)
    if c.q_lora_rank:
      self.wq_a = weight(keys[0], (d, c.q_lora_rank), std)
      self.q_norm = RMSNorm(c.q_lora_rank, c.norm_eps)
      self.wq_b = weight(keys[1], (c.q_lora_rank, h, c.qk_head_dim), std)
    else:
      self.wq = weight(keys[1], (d, h, c.qk_head_dim), std)
    self.wkv_a = weight(keys[2], (d, c.cache_dim), std)
    self.kv_norm = RMSNorm(c.kv_lora_rank, c.norm_eps)
    kv_width = c.qk_nope_head_dim + c.v_head_dim
    self.wkv_b = weight(keys[3], (c.kv_lora_rank, h, kv_width), std)
    self.wo = weight(keys[4], (h, c.v_head_dim, d), std)
    self.config = config

  def queries(self, x_BTD: jax.Array, positions_BT: jax.Array):
    """Unrotated and rotated parts: [B, T, H, N], [B, T, H, R]."""
    if self.config.q_lora_rank:
      latent_BTQ = checkpoint_name(linear(x_BTD, self.wq_a[...]), "latent")
      q_BTHK = linear(self.q_norm(latent_BTQ), self.wq_b[...])
    else:
      q_BTHK = linear(x_BTD, self.wq[...])
    q_BTHN, q_BTHR = jnp.split(q_BTHK, [self.config.qk_nope_head_dim], axis=-1)
    return q_BTHN, rotate(q_BTHR, positions_BT, self.config)

  def latents(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """What the cache keeps: [B, T, C + R], normed latent then rotated shared key."""
    raw_BTL = checkpoint_name(linear(x_BTD, self.wkv_a[...]), "latent")
    c_BTC, k_BTR = jnp.split(raw_BTL, [self.config.kv_lora_rank], axis=-1)
    k_BTR = rotate(k_BTR[:, :, None], positions_BT, self.config)[:, :, 0]
    return jnp.concatenate([self.kv_norm(c_BTC), k_BTR], axis=-1)

  def __call__(
    self,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Naive form over a whole sequence: output [B, T, D] and latents [B, T, C+R]."""
    c = self.config
    q_BTHK = jnp.concatenate(self.queries(x_BTD, positions_BT), axis=-1)
    latents_BTL = self.latents(x_BTD, positions_BT)
    c_BTC, k_BTR = jnp.split(latents_BTL, [c.kv_lora_rank], axis=-1)
    kv = linear(c_BTC, self.wkv_b[...])
    k_BTHN, v_BTHU = jnp.split(kv, [c.qk_nope_head_dim], axis=-1)
    k_BTHR = jnp.broadcast_to(
      k_BTR[:, :, None], (*k_BTHN.shape[:3], c.qk_rope_head_dim)
    )
    k_BTHK = jnp.concatenate([k_BTHN, k_BTHR], axis=-1)
    out = causal_attend(q_BTHK, k_BTHK, v_BTHU, softmax_scale(c), segments_BT)
    out_BTHU = checkpoint_name(out, "attention")
    return linear(out_BTHU, self.wo[...], contract=2), latents_BTL

  def cached(self, x_BTD: jax.Array, cache_BSL: jax.Array, positions_BT: jax.Array):
    """Absorbed form against a cache, to which the new tokens are first added.

    Returns:
      Output [B, T, D] and the new cache. A token sees the cache up to its position.
    """
    c = self.config
    q_BTHN, q_BTHR = self.queries(x_BTD, positions_BT)
    cache_BSL = write_cache(cache_BSL, self.latents(x_BTD, positions_BT), positions_BT)
    up_CHN, up_CHU = jnp.split(self.wkv_b[...], [c.qk_nope_head_dim], axis=-1)
    q_BTHC = jnp.einsum("bthn,chn->bthc", q_BTHN, up_CHN)
    q_BTHL = jnp.concatenate([q_BTHC, q_BTHR], axis=-1)
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    keys_BSL = cache_BSL.astype(x_BTD.dtype)
    scores = jnp.einsum("bthl,bsl->bhts", q_BTHL, keys_BSL, preferred_element_type=wide)
    seen_BTS = jnp.arange(cache_BSL.shape[1]) <= positions_BT[..., None]
    scores = jnp.where(seen_BTS[:, None], scores * softmax_scale(c), -jnp.inf)
    probs = jax.nn.softmax(scores, axis=-1).astype(x_BTD.dtype)
    # What lies beyond a position has weight 0, but 0 x NaN is NaN: no such garbage
    # can come, because caches start at zero and hold only what was written.
    mixed_BTHC = jnp.einsum("bhts,bsc->bthc", probs, keys_BSL[..., : c.kv_lora_rank])
    out_BTHU = jnp.einsum("bthc,chu->bthu", mixed_BTHC, up_CHU)
    return linear(out_BTHU, self.wo[...], contract=2), cache_BSL


class MultiHeadAttention(nnx.Module):
  """Plain attention with whole-width rotary keys (DeepSeekMoE's models)."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    c, std = config, config.init_std
    keys = jax.random.split(key, 4)
    self.wq = weight(keys[0], (c.dim, c.n_heads, c.qk_head_dim), std)
    self.wk = weight(keys[1], (c.dim, c.n_heads, c.qk_head_dim), std)
    self.wv = weight(keys[2], (c.dim, c.n_heads, c.v_head_dim), std)
    self.wo = weight(keys[3], (c.n_heads, c.v_head_dim, c.dim), std)
    self.config = config

  def projections(self, x_BTD: jax.Array, positions_BT: jax.Array):
    q_BTHK = rotate(linear(x_BTD, self.wq[...]), positions_BT, self.config)
    k_BTHK = rotate(linear(x_BTD, self.wk[...]), positions_BT, self.config)
    return q_BTHK, k_BTHK, linear(x_BTD, self.wv[...])

  def __call__(
    self,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, D] and keys and values as a flat cache [B, T, L]."""
    q, k, v = self.projections(x_BTD, positions_BT)
    out = causal_attend(q, k, v, softmax_scale(self.config), segments_BT)
    out_BTHU = checkpoint_name(out, "attention")
    return linear(out_BTHU, self.wo[...], contract=2), _flat_cache(k, v)

  def cached(self, x_BTD: jax.Array, cache_BSL: jax.Array, positions_BT: jax.Array):
    """As `LatentAttention.cached`."""
    c = self.config
    q, k, v = self.projections(x_BTD, positions_BT)
    cache_BSL = write_cache(cache_BSL, _flat_cache(k, v), positions_BT)
    b, s, _ = cache_BSL.shape
    k_BSL, v_BSL = jnp.split(
      cache_BSL.astype(x_BTD.dtype), [c.n_heads * c.qk_head_dim], axis=-1
    )
    k_BSHK = k_BSL.reshape(b, s, c.n_heads, c.qk_head_dim)
    v_BSHU = v_BSL.reshape(b, s, c.n_heads, c.v_head_dim)
    seen_BTS = jnp.arange(s) <= positions_BT[..., None]
    out = attend(q, k_BSHK, v_BSHU, softmax_scale(c), seen_BTS)
    return linear(out, self.wo[...], contract=2), cache_BSL


def _flat_cache(k_BTHK: jax.Array, v_BTHU: jax.Array) -> jax.Array:
  b, t = k_BTHK.shape[:2]
  return jnp.concatenate([k_BTHK.reshape(b, t, -1), v_BTHU.reshape(b, t, -1)], -1)


def make_attention(config: ModelConfig, key: jax.Array):
  kind = LatentAttention if config.kv_lora_rank else MultiHeadAttention
  return kind(config, key)
