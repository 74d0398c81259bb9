"""Settings of the job that places redundant experts. Standard library only.

The defaults are DeepSeek-V3's prefilling unit (report, 3.4.1): 32 GPUs on 4 nodes, each
with one expert more than its share of 256.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RebalanceConfig:
  redundant_experts: int = 32  # places besides one for each expert
  nodes: int = 4  # an expert's group stays on one, where they divide the groups
  gpus: int = 32  # of all nodes, which share the routed experts of each layer

  def __post_init__(self):
    for name, least in (("redundant_experts", 0), ("nodes", 1), ("gpus", 1)):
      value = getattr(self, name)
      if value < least:
        raise ValueError(f"rebalance.{name}={value} must be >= {least}")
    if self.gpus % self.nodes:
      raise ValueError(
        f"rebalance.nodes={self.nodes} must divide rebalance.gpus={self.gpus}"
      )

  def check(self, experts: int) -> None:
    """Refuses GPUs that `experts` routed experts cannot be shared by.

    Raises:
      ValueError: one line for the user.
    """
    if experts % self.gpus:
      raise ValueError(
        f"rebalance.gpus={self.gpus} must divide model.n_routed_experts={experts}, "
        "which they hold before copies are added"
      )
    if self.redundant_experts % self.gpus:
      raise ValueError(
        f"rebalance.redundant_experts={self.redundant_experts} must be a multiple of "
        f"rebalance.gpus={self.gpus}: each GPU holds equally many"
      )
