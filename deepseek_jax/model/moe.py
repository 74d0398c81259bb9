"""DeepSeekMoE: shared experts for every token, routed experts for the chosen few.

DeepSeekMoE (2401.06066) section 3; DeepSeek-V3 report, section 2.1.2.

Shape suffixes: B batch, T time, M=B*T tokens, D model, E experts, A active experts,
S axes of experts, X most copies of one expert.
"""

import dataclasses
import math

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import BalanceConfig, ModelConfig
from deepseek_jax.model import router as routing
from deepseek_jax.model.experts import Experts
from deepseek_jax.model.layers import FeedForward
from deepseek_jax.parallel.places import choose_places


@dataclasses.dataclass(frozen=True)
class Execution:
  """How a model runs, apart from what it computes. Static under jit."""

  expert_axes: tuple[str, ...] = ()  # mesh axes that routed experts are split over
  capacity: float = math.inf  # see parallel/dispatch.py
  decoding: bool = False  # a few tokens of each sequence, without gradients
  remat: str = "none"  # none, deepseek or full
  balance: BalanceConfig = dataclasses.field(
    default_factory=lambda: BalanceConfig(sequence=0.0)
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class RoutingStats:
  """What one layer (or, stacked, all layers) says of this device's routing."""

  counts_E: jax.Array  # int32: tokens that chose each expert
  balance: jax.Array  # weighted balance losses, summed over sequences
  entropy: jax.Array  # nats, summed over tokens
  overflow: jax.Array  # bool
  copies_S: jax.Array  # int32: tokens sent along each axis, see parallel/dispatch.py


class PlaceTable(nnx.Variable):
  """Places of experts: integers that no gradient trains."""


class Places(nnx.Module):
  """Where each expert is held, where some are held more than once.

  DeepSeek-V3 report, section 3.4. For inference: training and checkpoints hold each
  expert once and know nothing of places. See infer/placement.py.
  """

  def __init__(self, table_EX: jax.Array, count: int, spec: P):
    """`count` places in all; `table_EX` has -1 behind an expert's last."""
    self.table = PlaceTable(table_EX, spec=spec, high_precision=True)
    self.count = count


class MoE(nnx.Module):
  places: Places | None = None  # None: expert e is at place e

  def __init__(self, config: ModelConfig, key: jax.Array):
    k_router, k_experts, k_shared = jax.random.split(key, 3)
    self.router = routing.Router(config, k_router)
    self.experts = Experts(config, k_experts)
    if config.n_shared_experts:
      width = config.n_shared_experts * config.moe_inter_dim
      self.shared = FeedForward(config.dim, width, config.init_std, k_shared)
    self.config = config

  def __call__(
    self, x_BTD: jax.Array, execution: Execution
  ) -> tuple[jax.Array, RoutingStats]:
    c = self.config
    b, t, d = x_BTD.shape
    x_MD = x_BTD.reshape(-1, d)
    scores_ME, experts_MA, gates_MA = self.router(x_MD)
    experts_MA = checkpoint_name(experts_MA, "plan")
    places_MA, n_places = experts_MA, c.n_routed_experts
    if self.places is not None:
      table_EX, n_places = self.places.table[...], self.places.count
      places_MA = choose_places(experts_MA, table_EX, execution.expert_axes)
    plan = self.experts.plan(
      places_MA,
      n_experts=n_places,
      capacity=execution.capacity,
      axes=execution.expert_axes,
      decoding=execution.decoding,
    )
    out_MD = self.experts(x_MD, gates_MA, plan)
    if c.n_shared_experts:
      out_MD = out_MD + self.shared(x_MD)
    stats = RoutingStats(
      counts_E=routing.count_choices(experts_MA, c.n_routed_experts),
      balance=routing.balance_loss(
        scores_ME.reshape(b, t, -1),
        experts_MA.reshape(b, t, -1),
        execution.balance,
        c,
      ),
      entropy=jax.lax.stop_gradient(routing.entropy(scores_ME)),
      overflow=plan.overflow,
      copies_S=plan.copies_S,
    )
    return out_MD.reshape(b, t, d), stats
