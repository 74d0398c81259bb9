"""Copies of a token on each network: flat dispatch against two axes of experts.

    python -m experiments.benchmarks.traffic --nodes 8 --gpus 8

Plans both forms for the same random routing at V3's shape (256 experts in 8 groups, of
which a token may use 4; 8 active) on simulated devices and counts what crosses between
nodes and between the GPUs of a node, token by token, a rank's copies to itself left
out. Counting needs no accelerator and says nothing about time.
"""

import argparse
import dataclasses

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from deepseek_jax.mesh import EXPERT_AXES, make_mesh, split_axes
from deepseek_jax.model.router import select_experts
from deepseek_jax.parallel.dispatch import make_plan
from deepseek_jax.presets import V3

DISPATCH_BYTES = 7168 + 4 * 7168 // 128  # FP8 codes and FP32 scales
COMBINE_BYTES = 2 * 7168  # BF16


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--nodes", type=int, default=8)
  parser.add_argument("--gpus", type=int, default=8, help="of a node")
  parser.add_argument("--tokens", type=int, default=512, help="of a GPU")
  args = parser.parse_args()
  ranks = args.nodes * args.gpus
  jax.config.update("jax_num_cpu_devices", ranks)

  scores = jax.random.uniform(jax.random.key(0), (ranks * args.tokens, 256))
  print(
    f"{args.nodes} nodes x {args.gpus} GPUs, {args.tokens} tokens a GPU, V3 routing"
  )
  print(
    "copies a token           between nodes    inside nodes    MB a GPU between nodes"
  )
  for limit in (V3.n_limited_groups, V3.n_expert_groups):
    config = dataclasses.replace(V3, n_limited_groups=limit)
    experts = np.asarray(select_experts(scores, None, config))
    for form, sizes in (("flat", (1, ranks)), ("two axes", (args.nodes, args.gpus))):
      between, inside = copies(experts, *sizes, args.gpus)
      each = between * args.tokens * (DISPATCH_BYTES + COMBINE_BYTES) / 1e6
      print(
        f"{limit} of 8 groups, {form:9}{between:14.3f}{inside:16.3f}{each:26.1f}",
        flush=True,
      )


def copies(experts_MA, nodes: int, expert: int, gpus: int) -> tuple[float, float]:
  """Mean copies of a token that cross nodes, and GPUs of a node, in this form."""
  mesh = make_mesh(node=nodes, expert=expert, devices=jax.devices("cpu"))

  def traffic(experts_MA):
    plan = make_plan(
      experts_MA, n_experts=V3.n_routed_experts, row_multiple=128, axes=split_axes(mesh)
    )
    return [line[None] for line in plan.traffic]

  spec = P(EXPERT_AXES)
  count = jax.shard_map(
    traffic, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
  )
  lines = [np.asarray(line) for line in jax.jit(count)(experts_MA)]
  if len(lines) == 1:  # one line of all ranks: the nodes are consecutive ranks
    sent, node = lines[0][0], np.arange(nodes * expert) // gpus
    across = node[:, None] != node
    inside = ~across & ~np.eye(len(node), dtype=bool)
    return sent[across].sum() / len(experts_MA), sent[inside].sum() / len(experts_MA)
  # Rank (node, gpu) reports its gpu's line of nodes and its node's line of GPUs.
  across, within = lines[0][:expert], lines[1][::expert]
  between, inside = (
    sum(line.sum() - np.trace(line) for line in part) for part in (across, within)
  )
  return between / len(experts_MA), inside / len(experts_MA)


if __name__ == "__main__":
  main()
