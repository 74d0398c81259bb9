"""A model whose experts are held more than once, as EPLB placed them, for inference.

DeepSeek-V3 report, section 3.4. Training holds each expert once; checkpoints do not
know of places, so a placement may change from one start to the next.

Left out: changing a placement while requests run.

Shape suffixes: L layers, E experts, R places, X most copies of one expert.
"""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.mesh import EXPERT_AXES, split_axes
from deepseek_jax.model.moe import MoE, Places
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.eplb import Placement
from deepseek_jax.parallel.places import fill_places


def place_experts(
  model: Transformer, placement: Placement, mesh: Mesh | None = None
) -> Transformer:
  """The model with its routed experts at the places of `placement`; computes the same.

  Args:
    model: in compute precision, FP8 included; on a mesh split as in compute. It is left
      as it is, and its experts stay in memory as long as it does.
    placement: of every layer with routed experts in order, MTP's last.
    mesh: where the model lies. Rank r of the expert axes gets the r-th share of places.

  Raises:
    ValueError: a placement for other layers or experts, or one whose places the ranks
      cannot share.
  """
  config, ranks = model.config, expert_ranks(mesh)
  stacked, ahead = config.n_moe_layers, config.n_mtp_layers
  layers, experts = placement.copies_LE.shape
  places = placement.expert_LR.shape[1]
  if (layers, experts) != (stacked + ahead, config.n_routed_experts):
    raise ValueError(
      f"the placement is for {layers} layers of {experts} routed experts, the model "
      f"has {stacked + ahead} of {config.n_routed_experts}"
    )
  if places % ranks:
    raise ValueError(f"{ranks} expert ranks cannot share {places} places evenly")
  placed = jax.tree.map(lambda leaf: leaf, model)  # new modules around the same arrays
  if stacked:
    _place(placed.moe_blocks.ffn, placement, slice(stacked), mesh)
  for depth, module in enumerate(placed.mtp):
    _place(module.block.ffn, placement, stacked + depth, mesh)
  return placed


def expert_ranks(mesh: Mesh | None) -> int:
  """Over how many devices the routed experts of a layer are split."""
  return math.prod(mesh.shape[axis] for axis in EXPERT_AXES) if mesh is not None else 1


def _place(moe: MoE, placement: Placement, rows: Any, mesh: Mesh | None) -> None:
  """Puts copies into a layer, or a stack of them; `rows` are its in the placement."""
  expert_R = placement.expert_LR[rows].astype(np.int32)
  moe.experts.w13 = _copy(moe.experts.w13, expert_R, mesh)
  moe.experts.w2 = _copy(moe.experts.w2, expert_R, mesh)
  table = placement.places_LEX[rows].astype(np.int32)
  spec = P(*moe.router.weight.get_metadata()["spec"][: expert_R.ndim - 1])
  where = NamedSharding(mesh, spec) if mesh is not None else None
  table = jax.device_put(table, where)
  moe.places = Places(table, expert_R.shape[-1], spec)


def _copy(variable: nnx.Variable, expert_R: np.ndarray, mesh: Mesh | None) -> Any:
  """Weights [(L,) E, ...] as [(L,) R, ...], all parts of them if FP8."""
  axes = split_axes(mesh) if mesh is not None else ()

  def fill(value, expert_R):
    def fill_layer(layer):
      w, expert_R = layer
      return jax.tree.map(lambda part: fill_places(part, expert_R, axes), w)

    layer = value, expert_R
    return lax.map(fill_layer, layer) if expert_R.ndim == 2 else fill_layer(layer)

  if mesh is not None:
    spec = variable.get_metadata()["spec"]
    split, whole = P(*spec[: expert_R.ndim]), P(*spec[: expert_R.ndim - 1])
    # check_vma=False: a shard's places are its own, whatever JAX can prove of them.
    fill = jax.shard_map(
      fill, mesh=mesh, in_specs=(split, whole), out_specs=split, check_vma=False
    )
  return variable.replace(jax.jit(fill)(variable[...], expert_R))
