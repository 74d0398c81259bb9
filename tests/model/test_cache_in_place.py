"""Decoding writes a cache in place: what is compiled has no second one."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.dense_config import TINY_DENSE
from deepseek_jax.model.dense import DenseTransformer
from deepseek_jax.model.transformer import Transformer
from tests.model.random_models import MHA, MLA, randomise

LAYERS, BATCH, LENGTH = 8, 2, 8192
KINDS = {
  "mla": (Transformer, dataclasses.replace(MLA, n_layers=LAYERS, max_seq_len=LENGTH)),
  "mha": (Transformer, dataclasses.replace(MHA, n_layers=LAYERS, max_seq_len=LENGTH)),
  "dense": (
    DenseTransformer,
    dataclasses.replace(
      TINY_DENSE, vocab_size=64, dim=32, head_dim=8, n_layers=LAYERS, max_seq_len=LENGTH
    ),
  ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_needs_no_second_cache(kind):
  """Besides the cache itself, room for a few of its eight layers at most."""
  make, config = KINDS[kind]
  model = jax.eval_shape(lambda: make(config, jax.random.key(0)))
  cache = jax.eval_shape(lambda m: m.empty_cache(BATCH, LENGTH, jnp.float32), model)
  one = jax.ShapeDtypeStruct((BATCH, 1), jnp.int32)

  def decode(model, cache, tokens, positions):
    return model.decode(tokens, cache, positions)

  step = jax.jit(decode, donate_argnums=1).lower(model, cache, one, one).compile()
  size = cache.size * cache.dtype.itemsize
  memory = step.memory_analysis()
  assert memory.alias_size_in_bytes == size
  assert memory.temp_size_in_bytes < size / 2
  shape = re.escape(f"f32[{','.join(map(str, cache.shape))}]")
  makers = set(re.findall(rf"= {shape}\S* ([\w-]+)\(", step.as_text()))
  assert "scatter" in makers
  assert not makers & {"copy", "concatenate", "pad", "dynamic-update-slice"}


@pytest.mark.parametrize("kind", KINDS)
def test_other_places_of_the_cache_stay(kind):
  make, config = KINDS[kind]
  blank = jax.eval_shape(lambda: make(config, jax.random.key(0)))
  model = randomise(blank, 0)
  before = jnp.ones((LAYERS, BATCH, 16, config.cache_dim))
  positions = np.array([[3], [11]])
  _, after = jax.jit(make.decode)(model, np.ones((2, 1), int), before, positions)
  written = np.arange(16) == positions  # [B, S]
  assert (np.asarray(after)[:, ~written] == 1).all()
  assert (np.asarray(after)[:, written] != 1).any(-1).all()
