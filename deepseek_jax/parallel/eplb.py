"""Where copies of experts live: DeepSeek's expert-parallel load balancer (EPLB).

Given measured loads, experts that carry most are held more than once, and the copies
("physical experts") are placed on GPUs so that each GPU holds as many and carries about
as much (DeepSeek-V3 report, 3.4; github.com/deepseek-ai/EPLB). Where the groups of
group-limited routing divide among the nodes, a group stays whole on one node
(hierarchical: prefill); otherwise placement ignores groups and nodes (global: decode).
Ties are broken as a stable sort and a first minimum break them, in float32, which
reproduces DeepSeek's published example exactly.

NumPy only. Left out, as in DeepSeek's: predicting loads, which is the caller's; keeping
a placement near the one before it; keeping copies of one expert apart.

Shape suffixes: L layers, E experts (logical), G groups, R physical experts, X most
copies of one expert, I items, P packs.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Placement:
  """Which expert each physical place holds, and where each expert is held.

  Place p lives on GPU p // (R / GPUs). Field order is DeepSeek's return order.
  """

  expert_LR: np.ndarray  # int64: expert held at each place
  places_LEX: np.ndarray  # int64: places of each expert in order of copy, -1 for none
  copies_LE: np.ndarray  # int64: number of places of each expert


def rebalance_experts(
  weight: np.ndarray, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Placement:
  """Chooses how often each expert is held and where.

  Args:
    weight: [layers, experts] measured load, tokens for example.
    num_replicas: places in all, at least the number of experts; R.
    num_groups: groups of consecutive experts in group-limited routing.
    num_nodes: nodes; a network inside one is faster than between them.
    num_gpus: GPUs in all; each gets num_replicas / num_gpus places.

  Raises:
    ValueError: sizes that do not divide, fewer places than experts, or loads that are
      not finite.
  """
  weight = np.asarray(weight, np.float32)
  _check(weight, num_replicas, num_groups, num_nodes, num_gpus)
  if num_groups % num_nodes:
    num_groups = num_nodes = 1
  expert_LR, copy_LR, copies_LE = _place_by_node(
    weight, num_replicas, num_groups, num_nodes, num_gpus
  )
  layers, experts = weight.shape
  places_LEX = np.full((layers, experts, copies_LE.max()), -1)
  layer_LR = np.arange(layers)[:, None]
  places_LEX[layer_LR, expert_LR, copy_LR] = np.arange(num_replicas)
  return Placement(expert_LR, places_LEX, copies_LE)


def as_placement(expert_LR: np.ndarray, experts: int) -> Placement:
  """The placement whose places hold these experts; an expert's copies in their order.

  Raises:
    ValueError: no table of experts, or one that leaves an expert out.
  """
  expert_LR = np.asarray(expert_LR)
  if expert_LR.ndim != 2 or not np.issubdtype(expert_LR.dtype, np.integer):
    raise ValueError(f"places need a table of integers, got shape {expert_LR.shape}")
  here_LER = expert_LR[:, None, :] == np.arange(experts)[:, None]
  copies_LE = here_LER.sum(-1)
  if (copies_LE == 0).any() or copies_LE.sum() != expert_LR.size:
    raise ValueError(f"each layer's places must hold all experts 0 to {experts - 1}")
  order_LER = np.argsort(~here_LER, axis=-1, kind="stable")  # its places first
  places_LEX = order_LER[..., : copies_LE.max(initial=0)]
  is_copy = np.arange(places_LEX.shape[-1]) < copies_LE[..., None]
  return Placement(expert_LR, np.where(is_copy, places_LEX, -1), copies_LE)


def one_of_each(layers: int, experts: int) -> Placement:
  """Every expert once, in order: the placement without redundancy."""
  return as_placement(np.tile(np.arange(experts), (layers, 1)), experts)


def gpu_loads(weight: np.ndarray, placement: Placement, num_gpus: int) -> np.ndarray:
  """[layers, GPUs] load of each GPU if copies share their expert's load evenly."""
  expert_LR = placement.expert_LR
  share_LE = np.asarray(weight, np.float64) / placement.copies_LE
  load_LR = np.take_along_axis(share_LE, expert_LR, axis=1)
  return load_LR.reshape(len(expert_LR), num_gpus, -1).sum(-1)


def pack_evenly(weight_LI: np.ndarray, packs: int) -> tuple[np.ndarray, np.ndarray]:
  """Splits items into packs of equal number and near-equal weight.

  Heaviest first, each to the lightest pack that has room, as DeepSeek does; one item a
  pack keeps its place.

  Returns:
    pack_LI and position_LI: each item's pack, and its place within it.
  """
  layers, items = weight_LI.shape
  room = items // packs
  if room == 1:
    return np.tile(np.arange(items), (layers, 1)), np.zeros((layers, items), int)
  pack_LI = np.empty((layers, items), int)
  position_LI = np.empty((layers, items), int)
  order_LI = np.argsort(-weight_LI, axis=1, kind="stable")
  for layer in range(layers):
    load_P, held_P = np.zeros(packs, np.float32), np.zeros(packs, int)
    for item in order_LI[layer]:
      pack = np.argmin(np.where(held_P < room, load_P, np.inf))
      pack_LI[layer, item], position_LI[layer, item] = pack, held_P[pack]
      load_P[pack] += weight_LI[layer, item]
      held_P[pack] += 1
  return pack_LI, position_LI


def replicate(
  weight_LE: np.ndarray, places: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Fills places: each expert once, then, again and again, another copy of the one
  whose copies carry most.

  Returns:
    expert_LR, copy_LR: what a place holds, and the how-manieth copy; copies_LE.
  """
  layers, experts = weight_LE.shape
  expert_LR = np.tile(np.arange(places), (layers, 1))
  copy_LR = np.zeros((layers, places), int)
  copies_LE = np.ones((layers, experts), int)
  every = np.arange(layers)
  for place in range(experts, places):
    heaviest_L = np.argmax(weight_LE / copies_LE.astype(np.float32), axis=1)
    expert_LR[:, place] = heaviest_L
    copy_LR[:, place] = copies_LE[every, heaviest_L]
    copies_LE[every, heaviest_L] += 1
  return expert_LR, copy_LR, copies_LE


def _place_by_node(weight_LE, places, groups, nodes, gpus):
  """Groups to nodes; copies within a node; copies to the node's GPUs."""
  layers, experts = weight_LE.shape
  size, per_node = experts // groups, experts // nodes
  group_load = weight_LE.reshape(layers, groups, size).sum(-1)
  node_LG, position_LG = pack_evenly(group_load, nodes)
  # Experts renumbered so that those of one node stand together.
  first_LG = (node_LG * (groups // nodes) + position_LG) * size
  renumbered_LE = (first_LG[:, :, None] + np.arange(size)).reshape(layers, experts)
  original_LE = np.argsort(renumbered_LE, axis=1)

  node_weight = np.take_along_axis(weight_LE, original_LE, axis=1)
  node_weight = node_weight.reshape(layers * nodes, per_node)
  expert, copy, copies = replicate(node_weight, places // nodes)

  share = np.take_along_axis(node_weight / copies.astype(np.float32), expert, axis=1)
  gpu, position = pack_evenly(share, gpus // nodes)
  order = np.argsort(gpu * (places // gpus) + position, axis=1)
  expert, copy = (np.take_along_axis(a, order, axis=1) for a in (expert, copy))

  expert = expert.reshape(layers, nodes, -1) + np.arange(nodes)[:, None] * per_node
  expert_LR = np.take_along_axis(original_LE, expert.reshape(layers, -1), axis=1)
  copies_LE = np.take_along_axis(copies.reshape(layers, -1), renumbered_LE, axis=1)
  return expert_LR, copy.reshape(layers, -1), copies_LE


def _check(weight, num_replicas, num_groups, num_nodes, num_gpus):
  if weight.ndim != 2 or not np.isfinite(weight).all():
    raise ValueError(
      f"EPLB needs finite loads [layers, experts], got shape {weight.shape}: "
      "drop layers without routed experts and check the counts"
    )
  experts = weight.shape[1]
  for name, whole, part_name, part in (
    ("experts", experts, "num_groups", num_groups),
    ("num_replicas", num_replicas, "num_gpus", num_gpus),
    ("num_gpus", num_gpus, "num_nodes", num_nodes),
  ):
    if part < 1 or whole % part:
      raise ValueError(
        f"EPLB needs {part_name} to divide {name}, got {part_name}={part} and "
        f"{name}={whole}: change one"
      )
  if num_replicas < experts:
    raise ValueError(
      f"EPLB needs a place for each of {experts} experts, "
      f"got num_replicas={num_replicas}: raise it"
    )
