"""Tokens take an expert's copies in turn; weights reach their places bit by bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import ModelConfig
from deepseek_jax.mesh import EXPERT_AXES, make_mesh, split_axes
from deepseek_jax.model.router import select_experts
from deepseek_jax.parallel.eplb import gpu_loads, one_of_each, rebalance_experts
from deepseek_jax.parallel.places import choose_places, fill_places

EXPERTS, PLACES, ACTIVE, TOKENS = 16, 24, 4, 40  # tokens of a rank
MESHES = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (1, 8)}  # ranks: nodes and their devices


def mesh_of(ranks: int):
  node, expert = MESHES[ranks]
  return make_mesh(node=node, expert=expert, devices=jax.devices()[:ranks])


def skewed_choices(ranks: int) -> np.ndarray:
  """Distinct experts of each token; the first ones are liked best."""
  likes = np.random.default_rng(ranks).gumbel(size=(ranks * TOKENS, EXPERTS))
  likes += 6 / (1 + np.arange(EXPERTS))
  return np.argsort(-likes, axis=1)[:, :ACTIVE].astype(np.int32)


def count(experts: np.ndarray, n: int) -> np.ndarray:
  return np.bincount(experts.reshape(-1), minlength=n)


@functools.cache
def chosen(ranks: int):
  """Choices, the placement by their loads (eight GPUs), and the places taken."""
  experts_MA = skewed_choices(ranks)
  loads = count(experts_MA, EXPERTS)[None]
  placement = rebalance_experts(loads, PLACES, 4, 2, 8)
  mesh = mesh_of(ranks)
  choose = jax.shard_map(
    functools.partial(choose_places, axes=split_axes(mesh)),
    mesh=mesh,
    in_specs=(P(EXPERT_AXES), P()),
    out_specs=P(EXPERT_AXES),
  )
  table = placement.places_LEX[0].astype(np.int32)
  return experts_MA, loads, placement, np.asarray(jax.jit(choose)(experts_MA, table))


@pytest.mark.parametrize("ranks", MESHES)
def test_tokens_of_a_rank_take_copies_in_turn(ranks):
  """Read literally: one counter an expert, which starts at the rank's number."""
  experts_MA, _, placement, places_MA = chosen(ranks)
  assert placement.copies_LE.max() > 2
  for rank in range(ranks):
    turns = np.full(EXPERTS, rank)
    for token in range(rank * TOKENS, (rank + 1) * TOKENS):
      for expert, place in zip(experts_MA[token], places_MA[token]):
        held = placement.places_LEX[0, expert][: placement.copies_LE[0, expert]]
        assert place == held[turns[expert] % len(held)]
        assert placement.expert_LR[0, place] == expert
        turns[expert] += 1


@pytest.mark.parametrize("ranks", MESHES)
def test_copies_share_a_rank_within_one(ranks):
  _, _, placement, places_MA = chosen(ranks)
  for mine in places_MA.reshape(ranks, -1):
    taken_R = count(mine, PLACES)
    for expert in range(EXPERTS):
      assert np.ptp(taken_R[placement.expert_LR[0] == expert]) <= 1


@pytest.mark.parametrize("ranks", MESHES)
def test_real_loads_of_gpus_are_those_foretold(ranks):
  """And lower than with each expert once; the loads are skewed."""
  experts_MA, loads, placement, places_MA = chosen(ranks)
  real_G = count(places_MA, PLACES).reshape(8, -1).sum(1)
  foretold_G = gpu_loads(loads, placement, 8)[0]
  # A rank gives each of a GPU's three places less than one token too many or too few.
  assert np.abs(real_G - foretold_G).max() < 3 * ranks
  before_G = count(experts_MA, EXPERTS).reshape(8, -1).sum(1)
  np.testing.assert_array_equal(
    gpu_loads(loads, one_of_each(1, EXPERTS), 8)[0], before_G
  )
  assert real_G.max() < 0.75 * before_G.max()


def test_tokens_stay_on_the_nodes_of_their_groups():
  """Group-limited routing and the hierarchical placement: a group is on one node."""
  config = ModelConfig(
    n_routed_experts=32, n_expert_groups=8, n_limited_groups=2, n_activated_experts=4
  )
  scores = jax.nn.sigmoid(jax.random.normal(jax.random.key(0), (500, 32)))
  scores = scores * jnp.linspace(1.0, 0.7, 32)
  experts_MA = np.asarray(select_experts(scores, None, config))
  placement = rebalance_experts(count(experts_MA, 32)[None], 48, 8, 4, 8)
  table = placement.places_LEX[0].astype(np.int32)
  node_MA = np.asarray(choose_places(experts_MA, table)) // (48 // 4)
  # Literally: the node of each group from the table of places.
  group_R = placement.expert_LR[0] // 4
  nodes_of = [set(np.flatnonzero(group_R == g) // 12) for g in range(8)]
  assert all(len(nodes) == 1 for nodes in nodes_of)
  for experts, nodes in zip(experts_MA, node_MA):
    assert {*nodes} <= set.union(*(nodes_of[g] for g in {*(experts // 4)}))
    assert len({*nodes}) <= config.n_limited_groups


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("ranks", MESHES)
def test_weights_at_places_are_the_experts(ranks, dtype):
  rng = np.random.default_rng(0)
  w_EW = jnp.asarray(rng.normal(size=(EXPERTS, 3, 5)), dtype).at[3].set(-0.0)
  expert_R = chosen(ranks)[2].expert_LR[0].astype(np.int32)
  mesh = mesh_of(ranks)
  fill = jax.shard_map(
    functools.partial(fill_places, axes=split_axes(mesh)),
    mesh=mesh,
    in_specs=(P(EXPERT_AXES), P()),
    out_specs=P(EXPERT_AXES),
    check_vma=False,
  )
  placed_RW = np.asarray(jax.jit(fill)(w_EW, expert_R))
  assert placed_RW.tobytes() == np.asarray(w_EW)[expert_R].tobytes()
