"""Our model against Hugging Face's, weight for weight.

The fixtures (tests/fixtures/make_hf.py) hold logits, losses, gradients, routing,
caches and greedy text of tiny random DeepSeek-V3 and V2 models, in FP32 and in true
FP64. FP64 proves that the mathematics is the same, with no rounding to hide behind;
FP32 proves that our rounding is as good as theirs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import ModelConfig
from deepseek_jax.io.hf_config import read_config
from deepseek_jax.model import rope
from deepseek_jax.model import router as routing
from deepseek_jax.model.layers import named_variables
from deepseek_jax.model.moe import Execution
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.train.loss import cross_entropy
from kernels_pallas import grouped_matmul as kernel
from tests.fixtures import weights

MODELS = ["v3", "v3_direct", "v3_mtp", "v2", "v2_lite", "mha"]
FP32, FP64 = jnp.float32, jnp.float64
# Compiling takes nearly all the time, so each mechanism runs once in FP64 and once in
# FP32, and is differentiated once.
LOGITS = {
  FP32: ["v3", "v3_direct", "v2", "v2_lite"],
  FP64: ["v3_direct", "v3_mtp", "v2", "mha"],
}
GRADIENTS = {FP32: ["v3", "v3_direct", "v2"], FP64: ["v3_mtp"]}


def as_hf(named: dict[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
  """Our tensors under Hugging Face's names: [out, in], one layer and expert each."""
  named = dict(named)
  found = {
    "model.embed_tokens.weight": named.pop("embed.weight"),
    "lm_head.weight": named.pop("head.weight").T,
    "model.norm.weight": named.pop("norm.weight"),
  }
  for path, value in named.items():
    place, _, rest = path.partition(".")
    if place == "mtp":
      depth, _, rest = rest.partition(".")
      layers = {config.n_layers + int(depth): value}
    else:
      first = config.n_dense_layers if place == "moe_blocks" else 0
      layers = {first + i: one for i, one in enumerate(value)}
    for i, one in layers.items():
      for name, tensor in _rename(rest.removeprefix("block."), one).items():
        found[f"model.layers.{i}.{name}"] = tensor
  return found


NAMES = {
  "attn_norm.weight": "input_layernorm.weight",
  "ffn_norm.weight": "post_attention_layernorm.weight",
  "attn.wq": "self_attn.q_proj.weight",
  "attn.wk": "self_attn.k_proj.weight",
  "attn.wv": "self_attn.v_proj.weight",
  "attn.wq_a": "self_attn.q_a_proj.weight",
  "attn.q_norm.weight": "self_attn.q_a_layernorm.weight",
  "attn.wq_b": "self_attn.q_b_proj.weight",
  "attn.wkv_a": "self_attn.kv_a_proj_with_mqa.weight",
  "attn.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
  "attn.wkv_b": "self_attn.kv_b_proj.weight",
  "attn.wo": "self_attn.o_proj.weight",
  "ffn.w2": "mlp.down_proj.weight",
  "ffn.router.weight": "mlp.gate.weight",
  "ffn.router.bias": "mlp.gate.e_score_correction_bias",
  "ffn.shared.w2": "mlp.shared_experts.down_proj.weight",
  "enorm.weight": "enorm.weight",
  "hnorm.weight": "hnorm.weight",
  "eh_proj": "eh_proj.weight",
  "norm.weight": "shared_head.norm.weight",
}


def _rename(path: str, value: np.ndarray) -> dict[str, np.ndarray]:
  """One tensor of a layer in Hugging Face's terms."""
  if path.startswith("ffn.experts."):
    plain = path.replace("experts.", "")
    return {
      name.replace("mlp.", f"mlp.experts.{i}."): tensor
      for i, one in enumerate(value)
      for name, tensor in _rename(plain, one).items()
    }
  if path.endswith("w13"):
    start = "mlp.shared_experts" if "shared" in path else "mlp"
    gate, up = np.split(value.T, 2)
    return {f"{start}.gate_proj.weight": gate, f"{start}.up_proj.weight": up}
  if path == "attn.wo":  # [H, U, D]
    value = value.reshape(-1, value.shape[-1])
  elif value.ndim == 3:  # [in, H, width]: heads one after another
    value = value.reshape(value.shape[0], -1)
  return {NAMES[path]: value.T}


def load(meta: dict) -> Transformer:
  """Our FP32 model with the fixture's weights.

  The way back from `as_hf`, by numbering our elements and seeing where each goes.
  """
  config, _ = read_config(meta["config"])
  assert isinstance(config, ModelConfig)
  blank = jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))
  variables, treedef = jax.tree.flatten(blank)
  numbers = np.split(
    np.arange(sum(v.size for v in variables)),
    np.cumsum([v.size for v in variables])[:-1],
  )
  numbered = [n.reshape(v.shape) for n, v in zip(numbers, variables)]
  places = as_hf(arrays_of(treedef.unflatten(numbered)), config)
  tensors = weights.draw_all(meta)
  assert set(places) == set(tensors)
  flat = np.full(sum(v.size for v in variables), np.nan, np.float32)
  for name, tensor in tensors.items():
    flat[places[name]] = tensor
  assert not np.isnan(flat).any()
  return treedef.unflatten([flat[n] for n in numbered])


def arrays_of(model: Transformer) -> dict[str, np.ndarray]:
  return {name: np.asarray(v[...]) for name, v in named_variables(model).items()}


@functools.cache
def fixture(name: str) -> tuple[Transformer, dict[str, np.ndarray]]:
  meta, arrays = weights.load(name)
  return load(meta), arrays


def total_loss(model: Transformer, ids: jax.Array):
  """The sum of the mean losses of the model and each MTP depth; they; all logits.

  With training's own cross entropy and recomputation, whose gradients are by hand.
  """
  run, length = Execution(remat="deepseek"), ids.shape[1]
  hidden = model(ids, execution=run).hidden_BTD
  ahead, _ = model.look_ahead(hidden[:, :-1], ids[:, 1:], execution=run)
  losses, every = [], []
  for k, state in enumerate([model.norm(hidden), *ahead], start=1):
    known = state[:, : length - k].reshape(-1, state.shape[-1])
    share = jnp.full(len(known), 1 / len(known), known.dtype)
    targets = ids[:, k:].reshape(-1)
    losses.append(cross_entropy(known, model.head.weight[...], targets, share))
    every.append(model.head(state))
  return sum(losses), (jnp.stack(losses), every)


def once(fn):
  """jit for programs that run once: compiling is all that takes time."""
  return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def run(name: str, dtype):
  """Losses, all logits, and gradients under Hugging Face's names or None."""
  model, arrays = fixture(name)
  model = jax.tree.map(lambda x: jnp.asarray(x, dtype), model)
  if name not in GRADIENTS[dtype]:
    _, (losses, every) = once(total_loss)(model, arrays["ids"])
    return losses, every, None
  differentiate = once(jax.value_and_grad(total_loss, has_aux=True))
  (_, (losses, every)), gradients = differentiate(model, arrays["ids"])
  return losses, every, as_hf(arrays_of(gradients), model.config)


def expected_gradients(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The fixture's, with the experts' packed tensors taken apart."""
  found = {}
  for path, value in arrays.items():
    if not path.startswith("grad/"):
      continue
    name = path.removeprefix("grad/")
    start, packed, kind = name.partition(".experts.")
    if not packed:
      found[name] = value
      continue
    parts = {"down_proj": value}
    if kind == "gate_up_proj":
      parts = dict(zip(("gate_proj", "up_proj"), np.split(value, 2, axis=1)))
    for projection, stacked in parts.items():
      for i, one in enumerate(stacked):
        found[f"{start}.experts.{i}.{projection}.weight"] = one
  return found


def deviations(found, expected) -> dict[str, tuple[float, float]]:
  """Per parameter: error over norm, and largest error over largest element."""
  assert set(expected) <= set(found)
  table = {}
  for name, right in expected.items():
    wrong = np.asarray(found[name], np.float64) - right
    if not right.any():  # an expert that no token chose
      assert not wrong.any(), name
      continue
    table[name] = (
      np.linalg.norm(wrong) / np.linalg.norm(right),
      np.abs(wrong).max() / np.abs(right).max(),
    )
  return table


def assert_logits_and_losses(name, dtype, stored, atol, rtol):
  losses, every, _ = run(name, dtype)
  arrays = fixture(name)[1]
  for k, logits in enumerate(every):
    assert logits.dtype == dtype
    expected = arrays[f"mtp{k}_logits{stored}" if k else f"logits{stored}"]
    known = logits[:, : expected.shape[1]]
    np.testing.assert_allclose(known, expected, rtol=0, atol=atol)
  np.testing.assert_allclose(losses, arrays["losses"], rtol=rtol)


def assert_gradients(name, dtype, tolerance):
  """Of every parameter, by norm and by element.

  By element the bound is relative to the parameter's largest gradient: small elements
  are differences of large terms and can keep only the precision of those.
  """
  expected, found = expected_gradients(fixture(name)[1]), run(name, dtype)[2]
  biases = {n for n in found if n.endswith("e_score_correction_bias")}
  assert set(found) - biases == set(expected)
  assert not any(found[bias].any() for bias in biases)  # selection has no gradient
  for parameter, errors in deviations(found, expected).items():
    assert max(errors) < tolerance, (parameter, errors)


@pytest.fixture
def in_double(monkeypatch):
  """64-bit JAX. Kernels have no FP64, so the experts' product is written out."""

  def multiply(x_ZD, w_EDF, sizes_E, num_sms=None):
    del num_sms
    end_E = jnp.cumsum(sizes_E)
    row_Z1 = jnp.arange(len(x_ZD))[:, None]
    mine_ZE = (row_Z1 >= end_E - sizes_E) & (row_Z1 < end_E)
    return jnp.einsum("ze,zd,edf->zf", mine_ZE.astype(x_ZD.dtype), x_ZD, w_EDF)

  monkeypatch.setattr(kernel, "grouped_matmul", multiply)
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize("name", LOGITS[FP32])
def test_logits_and_losses_fp32(name):
  assert_logits_and_losses(name, FP32, stored=32, atol=2e-5, rtol=1e-6)
  assert_logits_and_losses(name, FP32, stored=64, atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize("name", GRADIENTS[FP32])
def test_gradient_of_every_parameter_fp32(name):
  assert_gradients(name, FP32, 1e-4)


@pytest.mark.parametrize("name", LOGITS[FP64])
@pytest.mark.usefixtures("in_double")
def test_logits_and_losses_fp64(name):
  """The same function to the last digits."""
  assert_logits_and_losses(name, FP64, stored=64, atol=1e-9, rtol=1e-12)


@pytest.mark.parametrize("name", GRADIENTS[FP64])
@pytest.mark.usefixtures("in_double")
def test_gradient_of_every_parameter_fp64(name):
  assert_gradients(name, FP64, 1e-7)  # FP32 is what the fixtures store


@pytest.mark.parametrize("name", MODELS)
def test_rotary_frequencies_and_softmax_scale(name):
  model, arrays = fixture(name)
  found = rope.frequencies(model.config)
  np.testing.assert_allclose(found, arrays["frequencies"], rtol=1e-12)
  scale = rope.softmax_scale(model.config)
  np.testing.assert_allclose(scale, arrays["softmax_scale"], rtol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_router_alone(name):
  """Choice and gates of the last layer, and with a bias near -2 for all experts."""
  model, arrays = fixture(name)
  config = model.config
  router = jax.tree.map(jnp.asarray, model.block(config.n_layers - 1).ffn.router)
  scores, experts, gates = router(jnp.asarray(arrays["gate_input"]))
  np.testing.assert_allclose(spread(experts, gates), arrays["gates"], atol=5e-6)
  if config.use_router_bias:
    experts = routing.select_experts(scores, arrays["gate_bias"], config)
    gates = routing.gate_weights(scores, experts, config)
    found = spread(experts, gates)
    np.testing.assert_allclose(found, arrays["gates_negative"], atol=5e-6)


def spread(experts_MA, gates_MA, n_experts: int = 16) -> np.ndarray:
  """[M, E]: the gates in their experts' columns, 0 elsewhere."""
  gates_ME = np.zeros((len(gates_MA), n_experts))
  np.put_along_axis(gates_ME, np.asarray(experts_MA), np.asarray(gates_MA), axis=1)
  return gates_ME


@pytest.mark.parametrize("name", ["v3", "v2", "mha"])
def test_cached_decoding_and_greedy_text(name):
  """Prefill half of the ids, read the others one by one, then continue greedily."""
  model, arrays = fixture(name)
  model = jax.tree.map(jnp.asarray, model)
  ids, greedy = arrays["ids"], arrays["greedy"]
  (batch, given), prefilled = ids.shape, ids.shape[1] - arrays["decode_logits"].shape[1]
  whole = np.concatenate([ids, greedy], axis=1)

  @once
  def prefill(model, ids):
    return model.prefill(ids, length=whole.shape[1])[1]

  @once
  def step(model, cache, ids_B, position):
    positions = jnp.full((batch, 1), position)
    hidden, cache = model.decode(ids_B[:, None], cache, positions)
    return model.head(model.norm(hidden))[:, 0], cache

  cache = prefill(model, ids[:, :prefilled])
  chosen = ids[:, prefilled]
  for t in range(prefilled, whole.shape[1] - 1):
    logits, cache = step(model, cache, chosen, t)
    if t < given:
      expected = arrays["decode_logits"][:, t - prefilled]
      np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
    chosen = ids[:, t + 1] if t + 1 < given else logits.argmax(-1)
    np.testing.assert_array_equal(chosen, whole[:, t + 1])
  last_layer = np.asarray(cache[-1, :, :given])
  expected = expected_cache(arrays)
  np.testing.assert_allclose(last_layer, expected, rtol=0, atol=2e-5)


def expected_cache(arrays: dict[str, np.ndarray]) -> np.ndarray:
  """The fixture's cache of the last layer as ours lies: [B, S, L]."""
  if "cache_latent" in arrays:
    return np.concatenate([arrays["cache_latent"], arrays["cache_rotary"]], axis=-1)
  parts = [arrays[n].swapaxes(1, 2) for n in ("cache_keys", "cache_values")]  # BSHK
  return np.concatenate([p.reshape(*p.shape[:2], -1) for p in parts], axis=-1)
