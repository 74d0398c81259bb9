"""Multi-head latent attention, naive and absorbed (DeepSeek-V2 report 2.1, V3 2.1.1).

Keys and values of all heads come from one latent vector a token, which with one
shared rotary key is all that generation keeps. Training expands the latent (naive);
decoding folds the expansion into query and output (absorbed). Both forms stand here
side by side and are equal. `MultiHeadAttention` is the plain form of DeepSeekMoE.

The cache of all layers is one array [Y, B, S, L]: what one token leaves behind in a
layer has L = `config.cache_dim` values. Layers write their rows into it in place.

Shape suffixes: B batch, T query time, S key time, D model, H heads, Q query latent,
C key-value latent, N nope, R rope, K=N+R, U value dim, L cache, Y layers; G heads of
keys and values where they are fewer than those of queries.
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
  k_BSGK: jax.Array,
  v_BSGU: jax.Array,
  scale: float,
  mask_BTS: jax.Array,
) -> jax.Array:
  """Softmax attention, scores and softmax in FP32; [B, T, H, U].

  Keys and values may have fewer heads than queries, G dividing H: each then serves
  H/G neighbouring queries, which are laid out as further query times.
  """
  b, t, h, width = q_BTHK.shape
  g = k_BSGK.shape[2]
  if g == h:
    return _attend(q_BTHK, k_BSGK, v_BSGU, scale, mask_BTS)
  folded = q_BTHK.reshape(b, t, g, h // g, width).swapaxes(2, 3)
  mask = jnp.repeat(mask_BTS, h // g, axis=1)
  out = _attend(folded.reshape(b, -1, g, width), k_BSGK, v_BSGU, scale, mask)
  return out.reshape(b, t, h // g, g, -1).swapaxes(2, 3).reshape(b, t, h, -1)


def _attend(q_BTHK, k_BSHK, v_BSHU, scale, mask_BTS):
  wide = jnp.promote_types(q_BTHK.dtype, jnp.float32)
  scores = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK, preferred_element_type=wide)
  scores = jnp.where(mask_BTS[:, None], scores * scale, -jnp.inf)
  probs = jax.nn.softmax(scores, axis=-1).astype(v_BSHU.dtype)
  return jnp.einsum("bhts,bshu->bthu", probs, v_BSHU)


def causal_attend(
  q_BTHK: jax.Array,
  k_BTGK: jax.Array,
  v_BTGU: jax.Array,
  scale: float,
  segments_BT: jax.Array | None = None,
) -> jax.Array:
  """Each position sees itself and what came before, within its segment if given.

  Heads as for `attend`. 16-bit inputs without segments run in cuDNN on a GPU; it
  wants values as wide as keys, so they are padded.
  """
  fused = (
    q_BTHK.dtype == jnp.bfloat16
    and segments_BT is None
    and jax.default_backend() == "gpu"
  )
  if fused:
    pad = q_BTHK.shape[-1] - v_BTGU.shape[-1]
    v_BTGK = jnp.pad(v_BTGU, ((0, 0), (0, 0), (0, 0), (0, pad)))
    out = jax.nn.dot_product_attention(
      q_BTHK, k_BTGK, v_BTGK, scale=scale, is_causal=True, implementation="cudnn"
    )
    return out[..., : v_BTGU.shape[-1]]
  t = q_BTHK.shape[1]
  mask = jnp.tril(jnp.ones((1, t, t), bool))
  if segments_BT is not None:
    mask &= segments_BT[:, :, None] == segments_BT[:, None, :]
  return attend(q_BTHK, k_BTGK, v_BTGU, scale, mask)


def write_cache(
  cache_YBSL: jax.Array,
  layer: jax.Array | int,
  new_BTL: jax.Array,
  positions_BT: jax.Array,
) -> jax.Array:
  """The cache with `new` at a layer's `positions`; outside S nothing is written."""
  rows_B1 = jnp.arange(cache_YBSL.shape[1])[:, None]
  return cache_YBSL.at[layer, rows_B1, positions_BT].set(
    new_BTL.astype(cache_YBSL.dtype), mode="drop"
  )


def read_cache(cache_YBSL: jax.Array, layer: jax.Array | int, dtype) -> jax.Array:
  """One layer's cache, [B, S, L]."""
  return jax.lax.dynamic_index_in_dim(cache_YBSL, layer, keepdims=False).astype(dtype)


class LatentAttention(nnx.Module):
  """MLA, with (`q_lora_rank > 0`) or without query compression."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    c, std = config, config.init_std
    d, h = c.dim, c.n_heads
    keys = jax.random.split(key, 5)
    if c.q_lora_rank:
      self.wq_a = weight(keys[0], (d, c.q_lora_rank), std, inputs=1, outputs=1)
      self.q_norm = RMSNorm(c.q_lora_rank, c.norm_eps)
      wq_b = (c.q_lora_rank, h, c.qk_head_dim)
      self.wq_b = weight(keys[1], wq_b, std, inputs=1, outputs=2)
    else:
      self.wq = weight(keys[1], (d, h, c.qk_head_dim), std, inputs=1, outputs=2)
    self.wkv_a = weight(keys[2], (d, c.cache_dim), std, inputs=1, outputs=1)
    self.kv_norm = RMSNorm(c.kv_lora_rank, c.norm_eps)
    wkv_b = (c.kv_lora_rank, h, c.qk_nope_head_dim + c.v_head_dim)
    self.wkv_b = weight(keys[3], wkv_b, std, inputs=1, outputs=2, absorbed=True)
    self.wo = weight(keys[4], (h, c.v_head_dim, d), std, inputs=2, outputs=1)
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
    out_BTHU = causal_attend(q_BTHK, k_BTHK, v_BTHU, softmax_scale(c), segments_BT)
    out_BTD = linear(out_BTHU, self.wo[...], contract=2, saved="attention")
    return out_BTD, latents_BTL

  def cached(
    self,
    x_BTD: jax.Array,
    cache_YBSL: jax.Array,
    layer: jax.Array | int,
    positions_BT: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """Absorbed form against a layer's cache, to which the new tokens are first added.

    Returns:
      Output [B, T, D] and the new cache. A token sees the cache up to its position.
    """
    c = self.config
    q_BTHN, q_BTHR = self.queries(x_BTD, positions_BT)
    latents_BTL = self.latents(x_BTD, positions_BT)
    cache_YBSL = write_cache(cache_YBSL, layer, latents_BTL, positions_BT)
    keys_BSL = read_cache(cache_YBSL, layer, x_BTD.dtype)
    up_CHN, up_CHU = jnp.split(self.wkv_b[...], [c.qk_nope_head_dim], axis=-1)
    q_BTHC = jnp.einsum("bthn,chn->bthc", q_BTHN, up_CHN)
    q_BTHL = jnp.concatenate([q_BTHC, q_BTHR], axis=-1)
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    scores = jnp.einsum("bthl,bsl->bhts", q_BTHL, keys_BSL, preferred_element_type=wide)
    seen_BTS = jnp.arange(keys_BSL.shape[1]) <= positions_BT[..., None]
    scores = jnp.where(seen_BTS[:, None], scores * softmax_scale(c), -jnp.inf)
    probs = jax.nn.softmax(scores, axis=-1).astype(x_BTD.dtype)
    # What lies beyond a position has weight 0, but 0 x NaN is NaN: no such garbage
    # can come, because caches start at zero and hold only what was written.
    # Rotary keys are mixed too and dropped after: cutting them off before would copy
    # the cache.
    mixed_BTHL = jnp.einsum("bhts,bsl->bthl", probs, keys_BSL)
    mixed_BTHC = mixed_BTHL[..., : c.kv_lora_rank]
    out_BTHU = jnp.einsum("bthc,chu->bthu", mixed_BTHC, up_CHU)
    return linear(out_BTHU, self.wo[...], contract=2), cache_YBSL


class MultiHeadAttention(nnx.Module):
  """Plain attention with whole-width rotary keys (DeepSeekMoE's models)."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    c, std = config, config.init_std
    keys = jax.random.split(key, 4)
    qk, v = (c.dim, c.n_heads, c.qk_head_dim), (c.dim, c.n_heads, c.v_head_dim)
    self.wq = weight(keys[0], qk, std, inputs=1, outputs=2)
    self.wk = weight(keys[1], qk, std, inputs=1, outputs=2)
    self.wv = weight(keys[2], v, std, inputs=1, outputs=2)
    self.wo = weight(keys[3], (*v[1:], c.dim), std, inputs=2, outputs=1)
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
    out_BTHU = causal_attend(q, k, v, softmax_scale(self.config), segments_BT)
    out_BTD = linear(out_BTHU, self.wo[...], contract=2, saved="attention")
    return out_BTD, flat_cache(k, v)

  def cached(
    self,
    x_BTD: jax.Array,
    cache_YBSL: jax.Array,
    layer: jax.Array | int,
    positions_BT: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """As `LatentAttention.cached`."""
    q, k, v = self.projections(x_BTD, positions_BT)
    cache_YBSL = write_cache(cache_YBSL, layer, flat_cache(k, v), positions_BT)
    flat_BSL = read_cache(cache_YBSL, layer, x_BTD.dtype)
    out = attend_flat(q, flat_BSL, k.shape[2], softmax_scale(self.config), positions_BT)
    return linear(out, self.wo[...], contract=2), cache_YBSL


def flat_cache(k_BTGK: jax.Array, v_BTGU: jax.Array) -> jax.Array:
  """Keys and values of all heads side by side, [B, T, L]."""
  b, t = k_BTGK.shape[:2]
  return jnp.concatenate([k_BTGK.reshape(b, t, -1), v_BTGU.reshape(b, t, -1)], -1)


def attend_flat(
  q_BTHK: jax.Array,
  flat_BSL: jax.Array,
  heads: int,
  scale: float,
  positions_BT: jax.Array,
) -> jax.Array:
  """Attention to a `flat_cache` of `heads` heads, up to each query's position."""
  b, s, _ = flat_BSL.shape
  k_BSL, v_BSL = jnp.split(flat_BSL, [heads * q_BTHK.shape[-1]], axis=-1)
  k_BSGK, v_BSGU = k_BSL.reshape(b, s, heads, -1), v_BSL.reshape(b, s, heads, -1)
  seen_BTS = jnp.arange(s) <= positions_BT[..., None]
  return attend(q_BTHK, k_BSGK, v_BSGU, scale, seen_BTS)


def make_attention(config: ModelConfig, key: jax.Array):
  kind = LatentAttention if config.kv_lora_rank else MultiHeadAttention
  return kind(config, key)
