"""Dense decoders, Qwen2 and Llama 3: the models that R1 was distilled into.

DeepSeek-R1 report (2501.12948), section 2.4. Grouped-query attention with rotary
halves, SwiGLU, RMSNorm; Qwen2 adds biases to queries, keys and values, Llama 3.1
scales its rotary frequencies. The class has the interface of `Transformer`: no expert
routes and no depth looks ahead, so the routing statistics are None. Left out: sliding
windows and dropout, which the six models do not use.

Shape suffixes: B batch, T time, D model, H query heads, G key and value heads, K head
width, V vocabulary, L cache of a token, Y layers, S cache.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from deepseek_jax.dense_config import DenseConfig
from deepseek_jax.model.attention import (
  attend_flat,
  causal_attend,
  flat_cache,
  read_cache,
  write_cache,
)
from deepseek_jax.model.layers import (
  Embedding,
  FeedForward,
  Head,
  RMSNorm,
  stack,
  weight,
)
from deepseek_jax.model.moe import Execution
from deepseek_jax.model.rope import llama_frequencies, turn
from deepseek_jax.model.transformer import Output, positions_of, run_block
from deepseek_jax.precision.linear import linear


class GroupedAttention(nnx.Module):
  """Attention in which H/G neighbouring query heads share keys and values."""

  def __init__(self, config: DenseConfig, key: jax.Array):
    c, std = config, config.init_std
    keys = jax.random.split(key, 4)
    self.wq = weight(keys[0], (c.dim, c.n_heads, c.head_dim), std)
    self.wk = weight(keys[1], (c.dim, c.n_kv_heads, c.head_dim), std)
    self.wv = weight(keys[2], (c.dim, c.n_kv_heads, c.head_dim), std)
    self.wo = weight(keys[3], (c.n_heads, c.head_dim, c.dim), std)
    if c.qkv_bias:
      self.bq = _bias(c.n_heads, c.head_dim)
      self.bk = _bias(c.n_kv_heads, c.head_dim)
      self.bv = _bias(c.n_kv_heads, c.head_dim)
    self.config = config

  def projections(self, x_BTD: jax.Array, positions_BT: jax.Array):
    """Rotated queries and keys, and values: [B, T, H, K], twice [B, T, G, K]."""
    c = self.config
    q_BTHK, k_BTGK = linear(x_BTD, self.wq[...]), linear(x_BTD, self.wk[...])
    v_BTGK = linear(x_BTD, self.wv[...])
    if c.qkv_bias:
      q_BTHK, k_BTGK = q_BTHK + self.bq[...], k_BTGK + self.bk[...]
      v_BTGK = v_BTGK + self.bv[...]
    freqs = llama_frequencies(c)
    q_BTHK = turn(q_BTHK, positions_BT, freqs, interleaved=False)
    return q_BTHK, turn(k_BTGK, positions_BT, freqs, interleaved=False), v_BTGK

  def __call__(
    self,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, D] and keys and values as a flat cache [B, T, L]."""
    q, k, v = self.projections(x_BTD, positions_BT)
    out = causal_attend(q, k, v, self.config.head_dim**-0.5, segments_BT)
    out_BTHK = checkpoint_name(out, "attention")
    return linear(out_BTHK, self.wo[...], contract=2), flat_cache(k, v)

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
    scale = self.config.head_dim**-0.5
    out = attend_flat(q, flat_BSL, k.shape[2], scale, positions_BT)
    return linear(out, self.wo[...], contract=2), cache_YBSL


def _bias(heads: int, width: int) -> nnx.Param:
  return nnx.Param(jnp.zeros((heads, width), jnp.float32), spec=P(), bias=True)


class DenseBlock(nnx.Module):
  """Attention and feed-forward, each behind a norm and a residual."""

  def __init__(self, config: DenseConfig, key: jax.Array):
    k_attn, k_ffn = jax.random.split(key)
    self.attn_norm = RMSNorm(config.dim, config.norm_eps)
    self.attn = GroupedAttention(config, k_attn)
    self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
    self.ffn = FeedForward(config.dim, config.inter_dim, config.init_std, k_ffn)

  def __call__(
    self,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    execution: Execution,
  ) -> tuple[jax.Array, None, jax.Array]:
    """Over whole sequences: output, no routing, and the layer's cache [B, T, L]."""
    out, cache = self.attn(self.attn_norm(x_BTD), positions_BT, segments_BT)
    x_BTD = checkpoint_name(x_BTD + out, "residual")
    return x_BTD + self.ffn(self.ffn_norm(x_BTD)), None, cache

  def cached(
    self,
    x_BTD: jax.Array,
    cache_YBSL: jax.Array,
    layer: jax.Array | int,
    positions_BT: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """Tokens that follow the cache of this layer: output and the new cache."""
    normed = self.attn_norm(x_BTD)
    out, cache_YBSL = self.attn.cached(normed, cache_YBSL, layer, positions_BT)
    x_BTD = x_BTD + out
    return x_BTD + self.ffn(self.ffn_norm(x_BTD)), cache_YBSL


class DenseTransformer(nnx.Module):
  """Qwen2 and Llama 3. Parameters are FP32 as made here."""

  def __init__(self, config: DenseConfig, key: jax.Array):
    c = config
    k_embed, k_blocks, k_head = jax.random.split(key, 3)
    self.embed = Embedding(c.vocab_size, c.dim, c.init_std, k_embed)
    self.blocks = stack(lambda k: DenseBlock(c, k), k_blocks, c.n_layers)
    self.norm = RMSNorm(c.dim, c.norm_eps)
    if not c.tie_embeddings:
      self.lm_head = Head(c.dim, c.vocab_size, c.init_std, k_head)
    self.config = config

  def __call__(
    self,
    tokens_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    execution: Execution = Execution(),  # noqa: B008
  ) -> Output:
    """The model over whole sequences; of `execution` only `remat` matters."""
    positions_BT = positions_of(tokens_BT)

    def layer(x_BTD, block):
      return run_block(block, x_BTD, positions_BT, segments_BT, execution)

    x_BTD, _ = jax.lax.scan(layer, self.embed(tokens_BT), self.blocks)
    return Output(x_BTD, None)

  def block(self, i: int) -> DenseBlock:
    """Layer i."""
    if not 0 <= i < self.config.n_layers:
      raise ValueError(f"layer {i} is not among the {self.config.n_layers} layers")
    return jax.tree.map(lambda leaf: leaf[i], self.blocks)

  def look_ahead(self, *_: Any, **__: Any) -> tuple[list[jax.Array], None]:
    """No multi-token prediction; takes what `Transformer.look_ahead` takes."""
    return [], None

  def head_weight(self) -> jax.Array:
    """[D, V], for the loss; of a tied model the embedding's transpose."""
    if self.config.tie_embeddings:
      return self.embed.weight[...].T
    return self.lm_head.weight[...]

  def head(self, normed: jax.Array) -> jax.Array:
    """Logits in FP32 of states behind the final norm."""
    wide = jnp.promote_types(normed.dtype, jnp.float32)
    return jnp.matmul(normed, self.head_weight(), preferred_element_type=wide)

  def logits(self, tokens_BT: jax.Array) -> jax.Array:
    """Logits, FP32 [B, T, V]."""
    return self.head(self.norm(self(tokens_BT).hidden_BTD))

  def empty_cache(self, batch: int, length: int, dtype: Any = None) -> jax.Array:
    """A cache for `length` tokens of each sequence, [Y, B, S, L]."""
    c = self.config
    dtype = dtype or self.embed.weight.dtype
    return jnp.zeros((c.n_layers, batch, length, c.cache_dim), dtype)

  def prefill(
    self,
    tokens_BT: jax.Array,
    length: int,
    execution: Execution = Execution(),  # noqa: B008
  ) -> tuple[jax.Array, jax.Array]:
    """As `Transformer.prefill`: hidden states [B, T, D] and the cache [Y, B, S, L]."""
    positions_BT = positions_of(tokens_BT)

    def layer(x_BTD, block):
      x_BTD, _, cache = block(x_BTD, positions_BT, None, execution)
      return x_BTD, cache

    x_BTD, cache = jax.lax.scan(layer, self.embed(tokens_BT), self.blocks)
    pad = length - tokens_BT.shape[1]
    return x_BTD, jnp.pad(cache, ((0, 0), (0, 0), (0, pad), (0, 0)))

  def decode(
    self,
    tokens_BT: jax.Array,
    cache: jax.Array,
    positions_BT: jax.Array,
    execution: Execution = Execution(),  # noqa: B008
  ) -> tuple[jax.Array, jax.Array]:
    """As `Transformer.decode`; nothing in `execution` matters here."""
    del execution

    def layer(carry, numbered):
      block, i = numbered
      return block.cached(*carry, i, positions_BT), None

    layers = jnp.arange(self.config.n_layers)
    carry = self.embed(tokens_BT), cache
    return jax.lax.scan(layer, carry, (self.blocks, layers))[0]
