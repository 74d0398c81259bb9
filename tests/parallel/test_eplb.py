"""EPLB: DeepSeek's published example, exact small cases, and what must always hold."""

import numpy as np
import pytest

from deepseek_jax.parallel.eplb import (
  as_placement,
  gpu_loads,
  one_of_each,
  pack_evenly,
  rebalance_experts,
  replicate,
)

# The example of github.com/deepseek-ai/EPLB's README and its printed answer. Layer 1
# has a tie (two copies of 172 against 86) that only a stable sort breaks this way.
LOADS = [
  [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
  [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PLACED = [
  [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
  [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_deepseeks_example():
  placement = rebalance_experts(np.array(LOADS), 16, 4, 2, 8)
  np.testing.assert_array_equal(placement.expert_LR, PLACED)
  assert placement.copies_LE.sum(1).tolist() == [16, 16]
  assert placement.places_LEX[0, 5].tolist() == [0, 2]
  assert placement.places_LEX[1, 0].tolist() == [13, -1]


def test_heaviest_experts_are_copied_first():
  # 12 | 6 | 4: the first halves (6 each), ties with 6 and stands first, then 6 / 2.
  expert, copy, copies = replicate(np.array([[12.0, 6.0, 4.0]], np.float32), 6)
  assert expert.tolist() == [[0, 1, 2, 0, 0, 1]]
  assert copy.tolist() == [[0, 0, 0, 1, 2, 1]]
  assert copies.tolist() == [[3, 2, 1]]


def test_packs_fill_heaviest_first():
  pack, position = pack_evenly(np.array([[1.0, 5.0, 4.0, 3.0, 2.0, 3.0]]), 2)
  # 5 to 0, 4 to 1, 3 to 1 (7), 3 to 0 (8), 2 to 1 (full), 1 to 0.
  assert pack.tolist() == [[0, 0, 1, 1, 1, 0]]
  assert position.tolist() == [[2, 0, 0, 1, 2, 1]]
  pack, position = pack_evenly(np.array([[1.0, 9.0, 4.0]]), 3)
  assert pack.tolist() == [[0, 1, 2]]
  assert position.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
  ("groups", "nodes", "gpus", "replicas"),
  [(8, 4, 32, 288), (8, 8, 16, 320), (8, 3, 18, 288), (1, 1, 64, 256)],
  ids=["hierarchical", "a group a node", "global", "no copies"],
)
def test_what_always_holds(groups, nodes, gpus, replicas):
  layers, experts = 5, 256
  rng = np.random.default_rng(groups * nodes)
  weight = rng.lognormal(0, 1.5, size=(layers, experts)) * 1000
  placement = rebalance_experts(weight, replicas, groups, nodes, gpus)
  held = placement.expert_LR
  assert held.shape == (layers, replicas)
  for layer in range(layers):
    np.testing.assert_array_equal(
      np.bincount(held[layer], minlength=experts), placement.copies_LE[layer]
    )
    for expert in range(experts):
      places = placement.places_LEX[layer, expert]
      n = placement.copies_LE[layer, expert]
      assert n >= 1
      assert (held[layer, places[:n]] == expert).all()
      assert len(set(places[:n])) == n
      assert (places[n:] == -1).all()
    if groups % nodes == 0:  # hierarchical: a group stays on one node
      node = np.arange(replicas) // (replicas // nodes)
      group = held[layer] // (experts // groups)
      assert all(len(set(node[group == g])) == 1 for g in range(groups))
  loads = gpu_loads(weight, placement, gpus)
  np.testing.assert_allclose(loads.sum(1), weight.sum(1))
  plain = weight.reshape(layers, gpus, -1).sum(-1) if experts % gpus == 0 else None
  if plain is not None and replicas > experts:
    assert (loads.max(1) < plain.max(1)).all()


def test_equal_loads_stay_equal():
  placement = rebalance_experts(np.ones((2, 64)), 64, 8, 2, 8)
  loads = gpu_loads(np.ones((2, 64)), placement, 8)
  assert (loads == 8).all()


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (((2, 12), 16, 5, 2, 8), "num_groups=5 and experts=12"),
    (((2, 12), 18, 4, 2, 8), "num_gpus=8 and num_replicas=18"),
    (((2, 12), 16, 4, 3, 8), "num_nodes=3 and num_gpus=8"),
    (((2, 12), 8, 4, 2, 8), "num_replicas=8: raise it"),
    (((12,), 16, 4, 2, 8), r"\[layers, experts\]"),
  ],
)
def test_refusals(args, message):
  shape, *rest = args
  with pytest.raises(ValueError, match=message):
    rebalance_experts(np.ones(shape), *rest)


def test_loads_that_are_not_numbers_are_refused():
  with pytest.raises(ValueError, match="finite"):
    rebalance_experts(np.array([[1.0, np.nan]]), 2, 1, 1, 2)


def test_a_placement_from_its_places_alone():
  placed = rebalance_experts(np.array(LOADS), 16, 4, 2, 8)
  again = as_placement(placed.expert_LR, 12)
  np.testing.assert_array_equal(again.copies_LE, placed.copies_LE)
  np.testing.assert_array_equal(
    np.sort(again.places_LEX, -1), np.sort(placed.places_LEX, -1)
  )
  assert again.places_LEX[0, 1].tolist() == [13, 15]  # by place, not by copy
  assert again.places_LEX[0, 0].tolist() == [12, -1]
  plain = one_of_each(2, 12)
  assert plain.expert_LR.tolist() == [list(range(12))] * 2
  assert plain.places_LEX.tolist() == [[[e] for e in range(12)]] * 2
  for wrong in ([[0, 1, 3]], [[0, 1, 1]], [[0, 1, -1]], [0, 1, 2], [[0.0, 1.0, 2.0]]):
    with pytest.raises(ValueError, match="places"):
      as_placement(np.array(wrong), 3)
