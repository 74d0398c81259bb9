"""Generation over meshes is that of one device, by whatever route tokens travel.

Prefill sends tokens to ranks, decoding to slots. Everything that no token wrote is NaN.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from deepseek_jax.infer.fp8 import in_fp8
from deepseek_jax.infer.generate import generate
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.layers import RouterBias, map_variables
from deepseek_jax.parallel import decode_dispatch
from tests.infer.test_generate import full_forward, run_config
from tests.model.random_models import YARN, random_model

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
# Five rows over eight ranks: three are padding, which ends at once.
PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12, 13], [60, 3, 60, 3, 60], [33, 2]]
NEW, STOPS = 16, [3, 17, 40]


@functools.cache
def models():
  """As it is, and one that sends every token to the two experts of one rank."""
  plain = random_model(YARN)

  def skew(variable):
    if not isinstance(variable, RouterBias):
      return variable
    return variable.replace(variable[...].at[:, 4:6].add(100.0))

  return {"any": plain, "one rank": map_variables(skew, plain)}


@functools.cache
def alone(kind: str):
  run = functools.partial(generate, models()[kind], run_config(YARN), PROMPTS)
  rows = run(max_new_tokens=NEW, stop_ids=STOPS)
  assert len({len(row) for row in rows}) > 1  # some end early
  return rows


def place(model, mesh):
  return map_variables(
    lambda v: v.replace(
      jax.device_put(v[...], NamedSharding(mesh, v.get_metadata()["spec"]))
    ),
    model,
  )


@pytest.fixture
def poisoned(monkeypatch):
  """NaN in every received row that nobody sent, in both dispatches."""
  clean, make_slots = decode_dispatch.all_to_all.dispatch, decode_dispatch.make_slots
  made = []

  def record_slots(*args, **kwargs):
    made.append(make_slots(*args, **kwargs))
    return made[-1]

  def dispatch(values, route, impl=None):
    filled = route.is_filled()

    def poison(x):
      if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
      return jnp.where(filled.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan)

    return jax.tree.map(poison, clean(values, route, impl))

  monkeypatch.setattr(decode_dispatch.all_to_all, "dispatch", dispatch)
  monkeypatch.setattr(decode_dispatch, "make_slots", record_slots)
  jax.clear_caches()
  yield
  jax.clear_caches()
  assert made[0].route is not None  # by slots, not by groups


@pytest.mark.parametrize(
  "sizes", [{"expert": 8}, {"node": 2, "expert": 4}], ids=["8", "2x4"]
)
def test_greedy_tokens_are_those_of_one_device(poisoned, sizes):
  mesh = make_mesh(**sizes)
  for kind, model in models().items():
    run = functools.partial(generate, place(model, mesh), run_config(YARN), PROMPTS)
    assert run(max_new_tokens=NEW, stop_ids=STOPS, mesh=mesh) == alone(kind), kind


def test_fp8_is_greedy_without_cache_and_the_same_on_a_mesh():
  plain = models()["any"]
  model = in_fp8(plain)
  stored = {x.dtype.name for x in jax.tree.leaves(model.moe_blocks.ffn.experts)}
  assert stored == {"float8_e4m3fn", "float32"}  # codes and scales
  rows = generate(model, run_config(YARN), PROMPTS, max_new_tokens=NEW)
  texts = np.zeros((len(PROMPTS), 32), np.int32)
  for text, prompt, row in zip(texts, PROMPTS, rows):
    text[: len(prompt) + NEW] = [*prompt, *row]
  logits = np.asarray(full_forward(model, texts))
  for logit, prompt, row in zip(logits, PROMPTS, rows):
    chosen = logit[len(prompt) - 1 : len(prompt) - 1 + NEW].argmax(-1)
    assert row == chosen.tolist()
  mesh = make_mesh(node=2, expert=4)
  split = in_fp8(place(plain, mesh), mesh)
  assert (
    generate(split, run_config(YARN), PROMPTS, max_new_tokens=NEW, mesh=mesh) == rows
  )
