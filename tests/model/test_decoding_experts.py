"""Experts of a decoding step are those of training: on every mesh, in any precision.

And a step of V3's shape lowers for Hopper and compiles for TPUs.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import ModelConfig
from deepseek_jax.mesh import BATCH_AXES, make_mesh, split_axes
from deepseek_jax.model.experts import Experts
from deepseek_jax.model.layers import (
  cast_for_compute,
  map_variables,
  quantize_for_compute,
)
from deepseek_jax.model.moe import Execution, MoE
from deepseek_jax.parallel.decode_dispatch import make_slots
from deepseek_jax.parallel.dispatch import make_plan
from deepseek_jax.precision.tiles import Recipe
from deepseek_jax.presets import TINY
from kernels_pallas import choose
from tests import tpu_topology

CONFIG = dataclasses.replace(
  TINY, dim=160, moe_inter_dim=48, n_routed_experts=8, n_activated_experts=3,
  init_std=0.1,
)  # fmt: skip
TOKENS = 24  # of all ranks
eight = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
RECIPES = {"fp8": Recipe(), "fp8 emulated": Recipe(emulated=True)}
MESHES = {"1": {}, "2x4": {"node": 2, "expert": 4}}


def inputs(kind: str, dtype):
  keys = jax.random.split(jax.random.key(0), 4)
  experts = cast_for_compute(Experts(CONFIG, keys[0]), dtype)
  x = jax.random.normal(keys[1], (TOKENS, CONFIG.dim), dtype)
  likes = jax.random.gumbel(keys[2], (TOKENS, 8))
  if kind == "same":  # every token's experts are on the first ranks
    likes += 100.0 * (jnp.arange(8) < 3)
  chosen = jax.lax.top_k(likes, 3)[1].astype(jnp.int32)
  return experts, x, jax.random.uniform(keys[3], (TOKENS, 3)), chosen


@functools.cache
def program(name: str, precision: str, slots: bool):
  sizes = MESHES[name]
  n = int(np.prod(list(sizes.values()), dtype=int))
  mesh = make_mesh(**sizes, devices=jax.devices()[:n])
  axes = split_axes(mesh)

  def body(experts, x, gates, chosen):
    if precision in RECIPES:
      experts = quantize_for_compute(experts, RECIPES[precision])
    if slots:
      return experts(x, gates, make_slots(chosen, n_experts=8, axes=axes))
    multiple = experts.row_multiple
    plan = make_plan(chosen, n_experts=8, row_multiple=multiple, axes=axes)
    return experts(x, gates, plan)

  spec = P(BATCH_AXES)
  step = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  return jax.jit(step)


def run(name: str, precision: str, kind: str, slots: bool) -> np.ndarray:
  dtype = jnp.float32 if precision == "fp32" else jnp.bfloat16
  return np.asarray(program(name, precision, slots)(*inputs(kind, dtype)), np.float64)


@pytest.mark.parametrize(
  ("precision", "kind"),
  [
    *itertools.product(("fp32", "bf16", "fp8"), ("any", "same")),
    ("fp8 emulated", "any"),
  ],
)
def test_slots_are_groups(precision, kind):
  """On one rank and on 2 x 4, against training's dispatch on one rank.

  FP32: sums of 160 and 48 products in other orders. BF16: training rounds what goes
  into the second product after its gate, decoding what comes out before it: 2^-8 each,
  and one output may cancel against another. FP8 tiles too lie before or after gates,
  3 bits of mantissa; an error of one code in 48, at random.
  """
  want = run("1", precision, kind, False)
  bound = {"fp32": 1e-6, "bf16": 2**-7}.get(precision, 2**-4) * abs(want).max()
  for name in MESHES:
    if name == "2x4" and len(jax.devices()) < 8:
      continue
    got = run(name, precision, kind, True)
    assert abs(got - want).max() < bound, name


@eight
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_meshes_agree_to_the_last_bit(precision):
  """Each row's way is its own, however many others there are beside it."""
  one, eight = run("1", precision, "any", True), run("2x4", precision, "any", True)
  np.testing.assert_array_equal(eight, one)


V3_LAYER = ModelConfig(dim=7168, moe_inter_dim=2048, n_routed_experts=64)


def decoding_step(mesh, config: ModelConfig, tokens: int, fp8: bool):
  """A layer's program for `tokens` tokens a rank, and the shapes of its arguments."""

  def make():
    layer = cast_for_compute(MoE(config, jax.random.key(0)), jnp.bfloat16)
    return quantize_for_compute(layer, Recipe()) if fp8 else layer

  layer = jax.eval_shape(make)
  specs = map_variables(lambda v: v.replace(v.get_metadata()["spec"]), layer)
  batch, ranks = P(BATCH_AXES), mesh.devices.size
  execution = Execution(expert_axes=split_axes(mesh), decoding=True)
  step = jax.shard_map(
    lambda layer, x: layer(x, execution)[0],
    mesh=mesh,
    in_specs=(specs, batch),
    out_specs=batch,
    check_vma=False,
  )
  x = jax.ShapeDtypeStruct((ranks * tokens, 1, config.dim), jnp.bfloat16)
  shapes = jax.tree.map(
    lambda leaf, spec: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
    ),
    (layer, x),
    jax.tree.broadcast((specs, batch), (layer, x), is_leaf=lambda s: isinstance(s, P)),
  )
  return jax.jit(step), shapes


@eight
@pytest.mark.parametrize(
  ("fp8", "sizes"),
  [(False, {"expert": 8}), (True, {"node": 2, "expert": 4})],
  ids=["bf16", "fp8"],
)
def test_a_step_of_v3_lowers_for_cuda(monkeypatch, fp8, sizes):
  """8 experts and 128 tokens a rank: dispatch, two products, and the way home."""
  monkeypatch.setattr(choose, "target_platform", lambda: "gpu")
  step, shapes = decoding_step(make_mesh(**sizes), V3_LAYER, 128, fp8)
  text = step.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("mosaic_gpu_v2") >= 4


@pytest.mark.parametrize(
  ("topology", "fp8"), [("v5p:2x2x1", False), ("tpu7x:2x2x1", True)]
)
def test_a_step_compiles_for_tpu_topologies(topology, fp8):
  devices = tpu_topology.devices(topology)[:4]
  mesh = make_mesh(node=2, expert=2, devices=devices)
  config = dataclasses.replace(V3_LAYER, n_routed_experts=32)
  step, shapes = decoding_step(mesh, config, 128, fp8)
  text = str(step.lower(*shapes).compile().as_text())
  assert text.count("tpu_custom_call") >= 4
