"""Our model against DeepSeek's own inference code, naive and absorbed, in FP32.

The fixture (tests/fixtures/make_deepseek.py) holds what that code computes from the
weights of the Hugging Face fixtures: a second opinion, independent of transformers, on
the absorbed form, YaRN, the router's mask and FP8 blocks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.io.fp8_weights import dequantise_tensor
from deepseek_jax.model import router as routing
from deepseek_jax.model.transformer import Transformer
from tests.fixtures import weights
from tests.model import test_hf
from tests.model.test_hf import in_double  # noqa: F401

META, THEIRS = weights.load("deepseek")
TOLERANCE = {"rtol": 0, "atol": 5e-6}


@functools.cache
def case(name: str) -> tuple[Transformer, np.ndarray]:
  model, arrays = test_hf.fixture(name)
  return jax.tree.map(jnp.asarray, model), arrays["ids"]


def with_config(model: Transformer, **changes) -> Transformer:
  """The model under other settings; each part carries its own."""
  config = dataclasses.replace(model.config, **changes)
  blank = jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))
  return jax.tree.unflatten(jax.tree.structure(blank), jax.tree.leaves(model))


def whole(model: Transformer, ids: np.ndarray) -> jax.Array:
  return test_hf.once(Transformer.logits)(model, ids)


@pytest.mark.parametrize("name", META["models"])
@pytest.mark.usefixtures("in_double")
def test_both_forms_in_double(name):
  """In FP64 but for their rope, softmax and gates, so rounding hides nothing."""
  model, ids = case(name)
  model = jax.tree.map(lambda x: x.astype(jnp.float64), model)
  logits = whole(model, ids)
  for form in ("naive", "absorb"):
    theirs = THEIRS[f"{name}/{form}_double"]
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", META["models"])
def test_both_forms(name):
  """Two roundings in FP32: their absorbed V3 alone is 8.3e-6 from FP64."""
  model, ids = case(name)
  logits = whole(model, ids)
  for form in ("naive", "absorb"):
    theirs = THEIRS[f"{name}/{form}_prefill"]
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=1e-5)


def decoded(model: Transformer, ids: np.ndarray, prefilled: int) -> np.ndarray:
  """Logits of the tokens after the first `prefilled`, one at a time."""
  length = ids.shape[1]

  @test_hf.once
  def step(model, cache, ids_B1, position):
    at = jnp.full(ids_B1.shape, position)
    hidden, cache = model.decode(ids_B1, cache, at)
    return model.head(model.norm(hidden))[:, 0], cache

  read = test_hf.once(lambda model, ids: model.prefill(ids, length)[1])
  cache, logits = read(model, ids[:, :prefilled]), []
  for t in range(prefilled, length):
    logits_BV, cache = step(model, cache, ids[:, t : t + 1], t)
    logits.append(logits_BV)
  return np.stack(logits, axis=1)


@pytest.mark.parametrize("name", META["models"])
@pytest.mark.usefixtures("in_double")
def test_absorbed_form_token_by_token_in_double(name):
  model, ids = case(name)
  model = jax.tree.map(lambda x: x.astype(jnp.float64), model)
  prefilled = ids.shape[1] - THEIRS[f"{name}/absorb_decode"].shape[1]
  logits = decoded(model, ids, prefilled)
  for form in ("absorb", "naive"):
    theirs = THEIRS[f"{name}/{form}_double"][:, prefilled:]
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", META["models"])
def test_absorbed_form_token_by_token(name):
  """Two roundings in FP32, up to 5.6e-6 (theirs) and 4.6e-6 from FP64."""
  model, ids = case(name)
  absorbed, naive = (THEIRS[f"{name}/{form}_decode"] for form in ("absorb", "naive"))
  logits = decoded(model, ids, ids.shape[1] - absorbed.shape[1])
  for theirs in (absorbed, naive):
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=1e-5)


def test_yarn_only_beyond_the_original_length():
  """Theirs looks at the longest sequence; an imported model has YaRN always."""
  model, ids = case("v3")
  assert model.config.yarn == "always"
  long, short = THEIRS["v3/naive_prefill"], THEIRS["v3_short/naive_prefill"]
  assert np.abs(long - short).max() > 1e-2
  for settings, theirs in (
    ({"yarn": "beyond_original", "max_seq_len": 5120}, long),
    ({"yarn": "beyond_original", "max_seq_len": 4096}, short),
    ({"max_seq_len": 4096}, long),
  ):
    logits = whole(with_config(model, **settings), ids)
    np.testing.assert_allclose(logits, theirs, **TOLERANCE)


def test_router_with_negative_scores():
  """With a bias of -2 for all experts a mask of zeros would choose others."""
  model, _ = case("v3")
  arrays = test_hf.fixture("v3")[1]
  config = model.config
  router = model.block(config.n_layers - 1).ffn.router
  scores, _, _ = router(jnp.asarray(arrays["gate_input"]))
  bias = jnp.full((config.n_routed_experts,), -2.0)
  experts = routing.select_experts(scores, bias, config)
  gates = routing.gate_weights(scores, experts, config)
  found = test_hf.spread(experts, gates)
  np.testing.assert_allclose(found, THEIRS["gates_minus_two"], **TOLERANCE)


def test_fp8_weight_of_576_rows():
  codes, scales = THEIRS["codes"], THEIRS["scales"]
  assert codes.shape[0] == 576
  assert scales.shape == (5, 2)
  found = dequantise_tensor(codes.view(jnp.float8_e4m3fn), scales)
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, THEIRS["dequantised"])
