"""The whole model: embedding, blocks, head, multi-token prediction.

DeepSeek-V3 report, sections 2.1 and 2.2. Repeated blocks are stacked on a leading
layer axis and scanned; `model.block(i)` takes one out.

Shape suffixes: B batch, T time, D model, V vocabulary, L layers, E experts, S cache.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.attention import make_attention
from deepseek_jax.model.layers import (
  Embedding,
  FeedForward,
  Head,
  RMSNorm,
  stack,
  weight,
)
from deepseek_jax.model.moe import Execution, MoE, RoutingStats
from deepseek_jax.precision.linear import linear

# What DeepSeek keeps for the backward pass (report 3.2.3): everything but norms, MLA
# up-projections and SwiGLU outputs, which are computed again.
SAVED = ("latent", "attention", "residual", "swiglu_input", "dispatched", "plan")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Output:
  hidden_BTD: jax.Array  # before the final norm
  stats: RoutingStats | None  # stacked over MoE layers; None if there are none


class Block(nnx.Module):
  """Attention and feed-forward, each behind a norm and a residual."""

  def __init__(self, config: ModelConfig, key: jax.Array, dense: bool):
    k_attn, k_ffn = jax.random.split(key)
    self.attn_norm = RMSNorm(config.dim, config.norm_eps)
    self.attn = make_attention(config, k_attn)
    self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
    if dense:
      self.ffn = FeedForward(config.dim, config.inter_dim, config.init_std, k_ffn)
    else:
      self.ffn = MoE(config, k_ffn)

  def __call__(
    self,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    execution: Execution,
  ) -> tuple[jax.Array, RoutingStats | None, jax.Array]:
    """Over whole sequences: output, routing, and the layer's cache [B, T, L]."""
    out, cache = self.attn(self.attn_norm(x_BTD), positions_BT, segments_BT)
    x_BTD = checkpoint_name(x_BTD + out, "residual")
    x_BTD, stats = self._feed_forward(x_BTD, execution)
    return x_BTD, stats, cache

  def cached(
    self,
    x_BTD: jax.Array,
    cache_YBSL: jax.Array,
    layer: jax.Array | int,
    positions_BT: jax.Array,
    execution: Execution,
  ) -> tuple[jax.Array, jax.Array]:
    """Tokens that follow the cache of this layer: output and the new cache."""
    normed = self.attn_norm(x_BTD)
    out, cache_YBSL = self.attn.cached(normed, cache_YBSL, layer, positions_BT)
    x_BTD, _ = self._feed_forward(x_BTD + out, execution)
    return x_BTD, cache_YBSL

  def _feed_forward(self, x_BTD, execution):
    normed = self.ffn_norm(x_BTD)
    if isinstance(self.ffn, MoE):
      out, stats = self.ffn(normed, execution)
    else:
      out, stats = self.ffn(normed), None
    return x_BTD + out, stats


def run_block(block, x_BTD, positions_BT, segments_BT, execution):
  """A block in training: its cache is dropped, its activations kept as configured."""

  def run(block, x_BTD):
    return block(x_BTD, positions_BT, segments_BT, execution)[:2]

  if execution.remat == "deepseek":
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED)
    run = jax.checkpoint(run, policy=policy)
  elif execution.remat == "full":
    run = jax.checkpoint(run)
  return run(block, x_BTD)


class Mtp(nnx.Module):
  """One depth of multi-token prediction; embedding and head are the main model's."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    k_proj, k_block = jax.random.split(key)
    self.enorm = RMSNorm(config.dim, config.norm_eps)
    self.hnorm = RMSNorm(config.dim, config.norm_eps)
    self.eh_proj = weight(k_proj, (2 * config.dim, config.dim), config.init_std)
    self.block = Block(config, k_block, dense=False)
    self.norm = RMSNorm(config.dim, config.norm_eps)
    self.config = config

  def join(self, hidden_BTD: jax.Array, embedded_BTD: jax.Array) -> jax.Array:
    """The state of position i with the embedding of the next token known there."""
    halves = [self.enorm(embedded_BTD), self.hnorm(hidden_BTD)]
    if self.config.mtp_concat == "hidden_first":
      halves.reverse()
    return linear(jnp.concatenate(halves, axis=-1), self.eh_proj[...])


class Transformer(nnx.Module):
  """DeepSeek-V3 and its relatives. Parameters are FP32 as made here."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    c = config
    k_embed, k_dense, k_moe, k_head, k_mtp = jax.random.split(key, 5)
    self.embed = Embedding(c.vocab_size, c.dim, c.init_std, k_embed)
    if c.n_dense_layers:
      self.dense_blocks = stack(
        lambda k: Block(c, k, dense=True), k_dense, c.n_dense_layers
      )
    if c.n_moe_layers:
      self.moe_blocks = stack(lambda k: Block(c, k, dense=False), k_moe, c.n_moe_layers)
    self.norm = RMSNorm(c.dim, c.norm_eps)
    self.head = Head(c.dim, c.vocab_size, c.init_std, k_head)
    self.mtp = nnx.List(
      [Mtp(c, jax.random.fold_in(k_mtp, i)) for i in range(c.n_mtp_layers)]
    )
    self.config = config

  def __call__(
    self,
    tokens_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    execution: Execution = Execution(),  # noqa: B008
  ) -> Output:
    """The main model over whole sequences."""
    positions_BT = positions_of(tokens_BT)
    x_BTD = self.embed(tokens_BT)

    def layer(x_BTD, block):
      return run_block(block, x_BTD, positions_BT, segments_BT, execution)

    stats = None
    for blocks in self.stacks():
      x_BTD, stats = jax.lax.scan(layer, x_BTD, blocks)
    return Output(x_BTD, stats)

  def stacks(self) -> list[Any]:
    """The stacked blocks in order: dense ones, then those with experts."""
    c = self.config
    return ([self.dense_blocks] if c.n_dense_layers else []) + (
      [self.moe_blocks] if c.n_moe_layers else []
    )

  def block(self, i: int) -> Block:
    """Layer i, counted over dense and MoE layers."""
    if not 0 <= i < self.config.n_layers:
      raise ValueError(f"layer {i} is not among the {self.config.n_layers} layers")
    dense = self.config.n_dense_layers
    blocks, i = (self.dense_blocks, i) if i < dense else (self.moe_blocks, i - dense)
    return jax.tree.map(lambda leaf: leaf[i], blocks)

  def mtp_input(self, hidden_BTD: jax.Array, norm: RMSNorm | None = None) -> jax.Array:
    """A state as the next MTP depth takes it: normed or not, by configuration."""
    if self.config.mtp_hidden == "pre_norm":
      return hidden_BTD
    return (norm or self.norm)(hidden_BTD)

  def look_ahead(
    self,
    hidden_BTD: jax.Array,
    tokens_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    execution: Execution = Execution(),  # noqa: B008
  ) -> tuple[list[jax.Array], RoutingStats | None]:
    """Multi-token prediction behind the main model.

    Args:
      hidden_BTD: the main model's `Output.hidden_BTD`.
      tokens_BT: the token after each position; depth k sees those k places on, and
        its last k - 1 positions see a meaningless repeat of the last.

    Returns:
      Normed states, one [B, T, D] a depth, for the head; and stacked routing.
    """
    positions_BT = positions_of(tokens_BT)
    state_BTD, normed, stats = self.mtp_input(hidden_BTD), [], []
    for depth, module in enumerate(self.mtp):
      ahead = jnp.minimum(positions_BT + depth, tokens_BT.shape[1] - 1)
      embedded = self.embed(jnp.take_along_axis(tokens_BT, ahead, axis=1))
      x_BTD, routed = run_block(
        module.block, module.join(state_BTD, embedded), positions_BT, segments_BT,
        execution,
      )  # fmt: skip
      state_BTD = self.mtp_input(x_BTD, module.norm)
      normed.append(module.norm(x_BTD))
      stats.append(routed)
    stacked = jax.tree.map(lambda *s: jnp.stack(s), *stats) if stats else None
    return normed, stacked

  def head_weight(self) -> jax.Array:
    """[D, V], for the loss."""
    return self.head.weight[...]

  def logits(self, tokens_BT: jax.Array) -> jax.Array:
    """Logits of the main model, FP32 [B, T, V]."""
    return self.head(self.norm(self(tokens_BT).hidden_BTD))

  def empty_cache(self, batch: int, length: int, dtype: Any = None) -> jax.Array:
    """A cache for `length` tokens of each sequence, [layers, B, S, L]."""
    c = self.config
    dtype = dtype or self.embed.weight.dtype
    return jnp.zeros((c.n_layers, batch, length, c.cache_dim), dtype)

  def prefill(
    self,
    tokens_BT: jax.Array,
    length: int,
    execution: Execution = Execution(),  # noqa: B008
  ) -> tuple[jax.Array, jax.Array]:
    """Reads prompts in the naive form.

    Args:
      tokens_BT: prompts, padded on the right with any token.
      length: of the cache to make, at least T.

    Returns:
      Hidden states [B, T, D] before the final norm, and the cache [layers, B, S, L].
      Places of padding hold garbage that decoding overwrites before it looks there.
    """
    positions_BT = positions_of(tokens_BT)
    x_BTD = self.embed(tokens_BT)

    def layer(x_BTD, block):
      x_BTD, _, cache = block(x_BTD, positions_BT, None, execution)
      return x_BTD, cache

    caches = []
    for blocks in self.stacks():
      x_BTD, cache = jax.lax.scan(layer, x_BTD, blocks)
      caches.append(cache)
    cache = jnp.concatenate(caches)
    pad = length - tokens_BT.shape[1]
    return x_BTD, jnp.pad(cache, ((0, 0), (0, 0), (0, pad), (0, 0)))

  def decode(
    self,
    tokens_BT: jax.Array,
    cache: jax.Array,
    positions_BT: jax.Array,
    execution: Execution = Execution(),  # noqa: B008
  ) -> tuple[jax.Array, jax.Array]:
    """Reads tokens that follow a cache, in the absorbed form; experts as for decoding.

    Args:
      tokens_BT: one or more new tokens of each sequence.
      cache: [layers, B, S, L], from `prefill` or `decode`.
      positions_BT: their places in the sequences; at S and beyond nothing is stored.

    Returns:
      Hidden states [B, T, D] before the final norm, and the new cache.
    """

    execution = dataclasses.replace(execution, decoding=True)

    def layer(carry, numbered):
      block, i = numbered
      return block.cached(*carry, i, positions_BT, execution), None

    # The whole cache is carried, not scanned over: XLA then writes the new rows in
    # place. As inputs and outputs of the scan every layer's cache would be copied.
    carry, start = (self.embed(tokens_BT), cache), 0
    for blocks, n in zip(self.stacks(), self._stack_sizes()):
      carry, _ = jax.lax.scan(layer, carry, (blocks, start + jnp.arange(n)))
      start += n
    return carry

  def _stack_sizes(self) -> list[int]:
    return [n for n in (self.config.n_dense_layers, self.config.n_moe_layers) if n]


def positions_of(tokens_BT: jax.Array) -> jax.Array:
  b, t = tokens_BT.shape
  return jnp.broadcast_to(jnp.arange(t), (b, t))
