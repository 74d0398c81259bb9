"""Rotary positions, YaRN (DeepSeek-V2 report 2.1.3 and 3.1.4; V3 report 4.3), and
the scaling of Llama 3.1, whose distilled models R1 taught.

Shape suffixes: B batch, T time, H heads, R rope.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.dense_config import DenseConfig
from deepseek_jax.model.layers import widen


def frequencies(config: ModelConfig) -> np.ndarray:
  """Radians a position for each rotated pair, float64 [R/2].

  With YaRN, pairs that turn more than `beta_fast` times within the original length
  keep their frequency, those below `beta_slow` are slowed by `rope_factor`, and a
  linear ramp joins them.
  """
  width = config.qk_rope_head_dim
  freqs = config.rope_theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
  if not config.use_yarn:
    return freqs

  def pair_of(turns: float) -> float:
    wavelength = config.original_seq_len / (turns * 2 * math.pi)
    return width * math.log(wavelength) / (2 * math.log(config.rope_theta))

  low = max(math.floor(pair_of(config.beta_fast)), 0)
  high = min(math.ceil(pair_of(config.beta_slow)), width - 1)
  if low == high:
    high += 0.001  # a step instead of a ramp
  ramp = np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)
  return freqs / config.rope_factor * ramp + freqs * (1 - ramp)


def llama_frequencies(config: DenseConfig) -> np.ndarray:
  """As `frequencies`, with Llama 3.1's scaling instead of YaRN; float64 [K/2].

  The ramp is linear in the turns within the original length, between
  `low_freq_factor` and `high_freq_factor` turns.
  """
  width = config.head_dim
  freqs = config.rope_theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
  turns = config.original_seq_len * freqs / (2 * math.pi)
  low, high = config.low_freq_factor, config.high_freq_factor
  keep = np.clip((turns - low) / (high - low), 0, 1)
  return freqs * (keep + (1 - keep) / config.rope_factor)


def softmax_scale(config: ModelConfig) -> float:
  """What multiplies query-key products: 1/sqrt(width), times mscale^2 under YaRN."""
  scale = config.qk_head_dim**-0.5
  if config.use_yarn:
    mscale = 0.1 * config.mscale * math.log(config.rope_factor) + 1
    scale *= mscale * mscale
  return scale


def rotate(x_BTHR: jax.Array, positions_BT: jax.Array, config: ModelConfig):
  """`turn` with the frequencies and pairs of a DeepSeek model."""
  return turn(x_BTHR, positions_BT, frequencies(config), config.rope_interleaved)


def turn(
  x_BTHR: jax.Array, positions_BT: jax.Array, freqs: np.ndarray, interleaved: bool
) -> jax.Array:
  """Turns pairs of the last dimension by position times frequency, in FP32.

  Pairs are neighbours (2i, 2i+1) if `interleaved`, else halves (i, i + R/2); the
  order of the dimensions does not change.
  """
  x = widen(x_BTHR)
  angles = positions_BT[..., None, None].astype(x.dtype) * jnp.asarray(freqs, x.dtype)
  cos, sin = jnp.cos(angles), jnp.sin(angles)  # [B, T, 1, R/2]
  if interleaved:
    a, b = x[..., 0::2], x[..., 1::2]
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    turned = turned.reshape(x.shape)
  else:
    a, b = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
  return turned.astype(x_BTHR.dtype)
