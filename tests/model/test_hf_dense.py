"""Dense decoders against Hugging Face's Qwen2 and Llama 3, weight for weight.

The fixtures (tests/fixtures/make_hf_dense.py) hold logits, gradients, caches and greedy
text of tiny random models, in FP32 and in true FP64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import Config, TrainConfig
from deepseek_jax.dense_config import DenseConfig
from deepseek_jax.infer.generate import generate
from deepseek_jax.io.hf_config import read_config
from deepseek_jax.model import rope
from deepseek_jax.model.dense import DenseTransformer
from deepseek_jax.model.layers import map_variables, named_variables
from deepseek_jax.model.moe import Execution
from deepseek_jax.train.loss import loss_parts
from tests.fixtures import weights

MODELS = ["qwen2", "llama3", "llama3_tied"]
DTYPES = {"float32": (2e-5, 1e-6), "float64": (1e-9, 1e-12)}  # logits, loss


@functools.cache
def fixture(name: str) -> tuple[DenseTransformer, dict[str, np.ndarray]]:
  """The model with the fixture's weights as NumPy arrays, and the fixture."""
  meta, arrays = weights.load(name)
  config, quantization = read_config(meta["config"], name=name)
  assert isinstance(config, DenseConfig)
  assert quantization is None
  blank = jax.eval_shape(lambda: DenseTransformer(config, jax.random.key(0)))
  found = ours(weights.draw_all(meta), config)
  variables = named_variables(blank)
  assert {n: v.shape for n, v in variables.items()} == {
    n: a.shape for n, a in found.items()
  }
  names = iter(variables)  # in the order of the leaves
  return map_variables(lambda v: v.replace(found[next(names)]), blank), arrays


def ours(hf: dict[str, np.ndarray], config: DenseConfig) -> dict[str, np.ndarray]:
  """A checkpoint's tensors, [out, in] and one layer each, as ours."""

  def layers(name: str) -> np.ndarray:
    return np.stack([hf[f"model.layers.{i}.{name}"] for i in range(config.n_layers)])

  def heads(name: str) -> np.ndarray:
    flat = layers(f"self_attn.{name}")
    if flat.ndim == 2:  # a bias
      return flat.reshape(config.n_layers, -1, config.head_dim)
    shape = (config.n_layers, config.dim, -1, config.head_dim)
    return flat.swapaxes(1, 2).reshape(shape)

  out = layers("self_attn.o_proj.weight").swapaxes(1, 2)
  gate, up = layers("mlp.gate_proj.weight"), layers("mlp.up_proj.weight")
  found = {
    "embed.weight": hf["model.embed_tokens.weight"],
    "norm.weight": hf["model.norm.weight"],
    "blocks.attn_norm.weight": layers("input_layernorm.weight"),
    "blocks.ffn_norm.weight": layers("post_attention_layernorm.weight"),
    "blocks.attn.wo": out.reshape(config.n_layers, -1, config.head_dim, config.dim),
    "blocks.ffn.w13": np.concatenate([gate, up], axis=1).swapaxes(1, 2),
    "blocks.ffn.w2": layers("mlp.down_proj.weight").swapaxes(1, 2),
  }
  for letter in "qkv":
    found[f"blocks.attn.w{letter}"] = heads(f"{letter}_proj.weight")
    if config.qkv_bias:
      found[f"blocks.attn.b{letter}"] = heads(f"{letter}_proj.bias")
  if not config.tie_embeddings:
    found["lm_head.weight"] = hf["lm_head.weight"].T
  return found


def once(fn):
  """jit for programs that run once: compiling is all that takes time."""
  return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def mean_loss(model, tokens):
  """Training's own loss; the fixture's is a mean over T - 1 targets."""
  parts = loss_parts(model, tokens, None, Execution(remat="deepseek"))
  assert parts.counts_LE.shape == (0, 0)
  return (parts.main + parts.mtp) / tokens[:, 1:].size, model.logits(tokens)


@functools.cache
def run(name: str, dtype: str):
  """Loss, logits, and gradients by our paths."""
  model, arrays = fixture(name)
  model = jax.tree.map(lambda x: jnp.asarray(x, dtype), model)
  differentiate = once(jax.value_and_grad(mean_loss, has_aux=True))
  (loss, logits), gradients = differentiate(model, arrays["ids"])
  named = {n: np.asarray(v[...]) for n, v in named_variables(gradients).items()}
  return loss, logits, named


CASES = [("qwen2", "float32"), ("llama3", "float64"), ("llama3_tied", "float32")]
CASES += [("qwen2", "float64")]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_logits_loss_and_gradients(name, dtype):
  with jax.enable_x64(dtype == "float64"):
    loss, logits, gradients = run(name, dtype)
  model, arrays = fixture(name)
  atol, rtol = DTYPES[dtype]
  assert logits.dtype == dtype
  stored = f"logits{dtype[-2:]}"
  np.testing.assert_allclose(logits, arrays[stored], rtol=0, atol=atol)
  np.testing.assert_allclose(loss, arrays["loss"], rtol=rtol)
  theirs = {p.removeprefix("grad/"): a for p, a in arrays.items() if "grad/" in p}
  expected = ours(theirs, model.config)
  assert set(expected) == set(gradients)
  for path, right in expected.items():
    error = np.abs(gradients[path] - right).max() / np.abs(right).max()
    assert error < (1e-4 if dtype == "float32" else 1e-7), (path, error)


@pytest.mark.parametrize("name", MODELS)
def test_rotary_frequencies(name):
  model, arrays = fixture(name)
  found = rope.llama_frequencies(model.config)
  np.testing.assert_allclose(found, arrays["frequencies"], rtol=1e-12)
  plain = 1.0 / model.config.rope_theta ** (np.arange(0, 8, 2) / 8)
  scaled = not np.allclose(found, plain)
  assert scaled == name.startswith("llama3")


def run_config(model: DenseTransformer) -> Config:
  train = TrainConfig(seq_len=16, batch_size=1)
  return Config(model=model.config, train=train, precision="fp32")


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text(name):
  """64 tokens by our generation, prefill and decoding with a cache."""
  model, arrays = fixture(name)
  given = arrays["greedy"].shape[1]
  prompts = arrays["ids"].tolist()
  rows = generate(model, run_config(model), prompts, max_new_tokens=given)
  assert rows == arrays["greedy"].tolist()


@pytest.mark.parametrize("name", ["qwen2", "llama3"])
def test_cached_decoding(name):
  """Logits of tokens read one by one after a prefill, and the last layer's cache."""
  model, arrays = fixture(name)
  model = jax.tree.map(jnp.asarray, model)
  ids, expected = arrays["ids"], arrays["decode_logits"]
  length = ids.shape[1]
  prefilled = length - expected.shape[1]

  @functools.partial(jax.jit, donate_argnums=1)
  def step(model, cache, ids_B1, positions_B1):
    hidden, cache = model.decode(ids_B1, cache, positions_B1)
    return model.head(model.norm(hidden))[:, 0], cache

  _, cache = once(lambda m, ids: m.prefill(ids, length))(model, ids[:, :prefilled])
  for t in range(prefilled, length):
    at = np.full((len(ids), 1), t)
    logits, cache = step(model, cache, ids[:, t : t + 1], at)
    right = expected[:, t - prefilled]
    np.testing.assert_allclose(logits, right, rtol=0, atol=2e-5)
  parts = [arrays[n].swapaxes(1, 2) for n in ("cache_keys", "cache_values")]  # BSGK
  flat = np.concatenate([p.reshape(*p.shape[:2], -1) for p in parts], axis=-1)
  np.testing.assert_allclose(cache[-1], flat, rtol=0, atol=2e-5)


def test_one_layer_taken_out():
  model, _ = fixture("qwen2")
  block = model.block(2)
  np.testing.assert_array_equal(block.attn.bq[...], model.blocks.attn.bq[...][2])
  with pytest.raises(ValueError, match="layer 3"):
    model.block(3)
