"""A model with redundant experts computes what it did, on one device and on meshes.

Generation with them is in tests/experiments/test_rebalance.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.infer.placement import expert_ranks, place_experts
from deepseek_jax.mesh import BATCH_AXES, make_mesh, split_axes
from deepseek_jax.model.layers import (
  cast_for_compute,
  map_variables,
  named_variables,
  quantize_for_compute,
)
from deepseek_jax.model.moe import Execution
from deepseek_jax.parallel.eplb import rebalance_experts
from deepseek_jax.precision.tiles import Recipe
from tests.model.random_models import MLA, random_model

CONFIG = dataclasses.replace(MLA, n_layers=2, n_dense_layers=0, n_mtp_layers=1)
LAYERS, EXPERTS, PLACES = 3, 8, 16
X = np.random.default_rng(0).normal(size=(8, 12, CONFIG.dim)).astype(np.float32)
MESHES = {
  "2x2": {"node": 2, "expert": 2},
  "8": {"expert": 8},
}


def mesh_of(name: str):
  sizes = MESHES[name]
  n = int(np.prod(list(sizes.values())))
  return make_mesh(**sizes, devices=jax.devices()[:n])


@functools.cache
def whole():
  return random_model(CONFIG)


@functools.cache
def placement():
  """By the loads of X, on eight GPUs of two nodes."""
  return rebalance_experts(once()[1], PLACES, 4, 2, 8)


@functools.cache
def once():
  """Outputs and loads with each expert held once, on one device."""
  return run(whole(), None)


def split(model, mesh):
  """The model as it lies on a mesh in compute."""

  def put(variable):
    sharding = NamedSharding(mesh, variable.get_metadata()["spec"])
    return variable.replace(jax.device_put(variable[...], sharding))

  return map_variables(put, model)


def layers(model, x, execution):
  """What each layer's experts make of x, and the tokens that chose each expert."""
  stacked = model.moe_blocks.ffn
  last = jax.tree.leaves(model.mtp[0].block.ffn)
  both = [jnp.concatenate([a, b[None]]) for a, b in zip(jax.tree.leaves(stacked), last)]
  every = jax.tree.unflatten(jax.tree.structure(stacked), both)
  _, (y, stats) = jax.lax.scan(lambda x, moe: (x, moe(x, execution)), x, every)
  return y, stats.counts_E


def run(model, mesh, dtype=np.float32):
  """`layers` on one device (mesh None) or on a mesh, which split X."""
  x = X.astype(dtype)
  if mesh is None:
    found = jax.jit(functools.partial(layers, execution=Execution()))(model, x)
    return jax.tree.map(np.asarray, found)

  def local(model, x):
    y, counts = layers(model, x, Execution(expert_axes=split_axes(mesh)))
    return y, jax.lax.psum(counts, BATCH_AXES)

  specs = map_variables(lambda v: v.replace(v.get_metadata()["spec"]), model)
  step = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(specs, P(BATCH_AXES)),
    out_specs=(P(None, BATCH_AXES), P()),
    check_vma=False,
  )
  return jax.tree.map(np.asarray, jax.jit(step)(model, x))


def test_copies_are_a_part_of_the_model_only_where_they_are():
  before = named_variables(whole())
  placed = place_experts(whole(), placement())
  assert named_variables(whole()).keys() == before.keys()  # left as it was
  added = named_variables(placed).keys() - before.keys()
  assert added == {
    "moe_blocks.ffn.places.table",
    "mtp.0.block.ffn.places.table",
  }
  for name, variable in named_variables(placed).items():
    meta = variable.get_metadata()
    assert isinstance(meta["spec"], P)
    if name in before:
      assert meta == before[name].get_metadata(), name
  # Table and router stay as they are whatever the type of the weights.
  cast = named_variables(cast_for_compute(placed, jnp.bfloat16))
  assert cast["moe_blocks.ffn.places.table"].dtype == jnp.int32
  assert cast["moe_blocks.ffn.experts.w13"].dtype == jnp.bfloat16


def test_every_place_holds_its_expert():
  placed = place_experts(whole(), placement())
  held = placement().expert_LR
  for name in ("w13", "w2"):
    old = np.asarray(getattr(whole().moe_blocks.ffn.experts, name)[...])
    new = np.asarray(getattr(placed.moe_blocks.ffn.experts, name)[...])
    for layer in range(2):
      np.testing.assert_array_equal(new[layer], old[layer][held[layer]])
    old = np.asarray(getattr(whole().mtp[0].block.ffn.experts, name)[...])
    new = np.asarray(getattr(placed.mtp[0].block.ffn.experts, name)[...])
    np.testing.assert_array_equal(new, old[held[2]])


def test_one_device_computes_the_same():
  """To the last bit: a token's experts are summed in the order of its choices."""
  for a, b in zip(once(), run(place_experts(whole(), placement()), None)):
    np.testing.assert_array_equal(b, a)


@pytest.mark.parametrize("name", ["2x2", "8"])
def test_meshes_compute_the_same(name):
  """To rounding: which rank sums which of a token's experts depends on their places."""
  mesh = mesh_of(name)
  placed = place_experts(split(whole(), mesh), placement(), mesh)
  w13 = placed.moe_blocks.ffn.experts.w13
  shard = w13[...].addressable_shards[0].data
  assert shard.shape[1] == PLACES // expert_ranks(mesh)
  (expected, counts), (found, placed_counts) = once(), run(placed, mesh)
  np.testing.assert_array_equal(placed_counts, counts)  # loads stay logical
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_fp8_weights_are_copied_with_their_scales():
  model = cast_for_compute(whole(), jnp.bfloat16)
  for moe in (model.moe_blocks.ffn, model.mtp[0].block.ffn):
    moe.experts = quantize_for_compute(moe.experts, Recipe())
  placed = place_experts(model, placement())
  held, every = placement().expert_LR[:2], np.arange(2)[:, None]
  old, new = (jax.tree.leaves(m.moe_blocks.ffn.experts) for m in (model, placed))
  for a, b in zip(old, new, strict=True):
    assert np.asarray(b).tobytes() == np.asarray(a)[every, held].tobytes()
  expected, found = (run(m, None, jnp.bfloat16)[0] for m in (model, placed))
  np.testing.assert_array_equal(found, expected)


def test_refusals():
  other = rebalance_experts(np.ones((2, EXPERTS)), PLACES, 4, 2, 8)
  with pytest.raises(
    ValueError, match="for 2 layers of 8 routed experts, the model has 3"
  ):
    place_experts(whole(), other)
  uneven = rebalance_experts(np.ones((LAYERS, EXPERTS)), 12, 4, 2, 4)
  with pytest.raises(ValueError, match="8 expert ranks cannot share 12 places"):
    place_experts(whole(), uneven, mesh_of("8"))
