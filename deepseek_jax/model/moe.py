"""DeepSeekMoE: shared experts for every token, routed experts for the chosen few.

DeepSeekMoE (2401.06066) section 3; DeepSeek-V3 report, section 2.1.2. Gates are
applied inside the expert, before its down-projection.

Shape suffixes: B batch, T time, M=B*T tokens, D model, F hidden, E experts,
A active experts, Z dispatched rows.
"""

import dataclasses
import math

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import BalanceConfig, ModelConfig
from deepseek_jax.mesh import EXPERT
from deepseek_jax.model import router as routing
from deepseek_jax.model.layers import FeedForward, weight
from deepseek_jax.parallel.dispatch import combine, dispatch
from deepseek_jax.precision.feed_forward import expert_feed_forward, row_multiple


@dataclasses.dataclass(frozen=True)
class Execution:
  """How a model runs, apart from what it computes. Static under jit."""

  expert_axis: str | None = None  # mesh axis that routed experts are split over
  capacity: float = math.inf  # see parallel/dispatch.py
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


class Experts(nnx.Module):
  """The routed experts' weights, split over the expert axis."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    k13, k2 = jax.random.split(key)
    e, d, f = config.n_routed_experts, config.dim, config.moe_inter_dim
    spec, std, one = P(EXPERT), config.init_std, {"inputs": 1, "outputs": 1}
    self.w13 = weight(k13, (e, d, 2 * f), std, spec, **one)
    self.w2 = weight(k2, (e, f, d), std, spec, **one)

  def __call__(self, rows_ZD, gates_Z, group_sizes_E) -> jax.Array:
    return expert_feed_forward(
      rows_ZD, gates_Z, group_sizes_E, self.w13[...], self.w2[...]
    )

  @property
  def row_multiple(self) -> int:
    """What the rows of each expert must be padded to."""
    return row_multiple(self.w13[...])


class MoE(nnx.Module):
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
    sent = dispatch(
      x_MD,
      experts_MA,
      gates_MA,
      n_experts=c.n_routed_experts,
      row_multiple=self.experts.row_multiple,
      capacity=execution.capacity,
      axis=execution.expert_axis,
    )
    out_ZD = self.experts(sent.rows_ZD, sent.gates_Z, sent.group_sizes_E)
    out_MD = combine(out_ZD, sent.plan)
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
      overflow=sent.overflow,
    )
    return out_MD.reshape(b, t, d), stats
