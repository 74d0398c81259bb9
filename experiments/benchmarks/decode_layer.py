"""Times the routed experts of one decoding step of V3's shape: slots beside groups.

    python -m experiments.benchmarks.decode_layer [--ranks N] [--tokens 1 16 128 512]

Router, dispatch, two products, and the way home, on `--ranks` GPUs with `--experts` in
all; no shared expert and no attention. "groups" is how training and prefill dispatch,
"slots" what decoding has (parallel/decode_dispatch.py); "chosen" says which of the two
`Experts.plan` takes. Router and tokens are random. GB/s count the weights of the
busiest rank's experts that have any token: what decoding cannot avoid to read.

A time is the median over runs of `--calls` calls queued at once, divided by their
number. Both forms' results are compared, and FP8's with BF16's.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.infer.fp8 import in_fp8
from deepseek_jax.mesh import BATCH_AXES, make_mesh, split_axes
from deepseek_jax.model.layers import cast_for_compute, map_variables
from deepseek_jax.parallel.decode_dispatch import Slots, make_slots
from deepseek_jax.parallel.dispatch import make_plan
from experiments.benchmarks.moe_layer import calc_diff, make_layer, seconds


def local_step(form, axes, layer, x_MD):
  """This rank's part of a step, and how many of its experts have any token."""
  _, experts_MA, gates_MA = layer.router(x_MD)
  settings = {"n_experts": layer.config.n_routed_experts, "axes": axes}
  if form == "slots":
    plan = make_slots(experts_MA, **settings)
    busy = (plan.counts_L > 0).sum()
  else:
    plan = make_plan(experts_MA, row_multiple=layer.experts.row_multiple, **settings)
    busy = (plan.group_sizes_E > 0).sum()
  return layer.experts(x_MD, gates_MA, plan), busy[None]


def make_step(form, mesh, layer):
  specs = map_variables(lambda v: v.replace(v.get_metadata()["spec"]), layer)
  return jax.jit(
    jax.shard_map(
      functools.partial(local_step, form, split_axes(mesh)),
      mesh=mesh,
      in_specs=(specs, P(BATCH_AXES)),
      out_specs=P(BATCH_AXES),
      check_vma=False,
    )
  )


def measure(tokens, layers, mesh, flags):
  ranks = mesh.devices.size
  dim, hidden = layers["BF16"].config.dim, layers["BF16"].config.moe_inter_dim
  x = jax.random.normal(jax.random.key(1), (ranks * tokens, dim), jnp.bfloat16)
  x = jax.device_put(x, NamedSharding(mesh, P(BATCH_AXES)))
  outputs = []
  for (precision, layer), size in zip(layers.items(), (2, 1)):
    some = jnp.zeros((tokens, layer.config.n_activated_experts), jnp.int32)
    chosen = "slots"
    if ranks == 1:
      plan = layer.experts.plan(some, n_experts=flags.experts, decoding=True)
      chosen = "slots" if isinstance(plan, Slots) else "groups"
    for form in ("groups", "slots"):
      run = make_step(form, mesh, layer)
      y, busy = jax.block_until_ready(run(layer, x))
      outputs.append(y)
      time_s = seconds(run, (layer, x), flags)
      read = int(np.max(busy)) * 3 * dim * hidden * size
      print(
        f"  {tokens:5d} tokens a rank  {precision:4s} {form:6s} {time_s * 1e6:9.1f} us"
        f"  {read / time_s / 1e9:7.1f} GB/s{'   chosen' if form == chosen else ''}",
        flush=True,
      )
  diffs = [f"{calc_diff(y, outputs[0]):.1e}" for y in outputs[1:]]
  print(f"        calc_diff to BF16 groups: {', '.join(diffs)}", flush=True)


def main():
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--ranks", type=int, default=1)
  parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 512])
  parser.add_argument("--experts", type=int, default=32, help="of all ranks")
  parser.add_argument("--tiny", action="store_true", help="small, to try the command")
  parser.add_argument("--runs", type=int, default=10, help="runs behind a median")
  parser.add_argument("--calls", type=int, default=20, help="calls queued in a run")
  flags = parser.parse_args()
  mesh = make_mesh(expert=flags.ranks, devices=jax.devices()[: flags.ranks])
  _, layer, *_ = make_layer(argparse.Namespace(**{**vars(flags), "tokens": 1}))
  bf16 = jax.jit(lambda m: cast_for_compute(m, jnp.bfloat16))(layer)
  bf16 = map_variables(
    lambda v: v.replace(
      jax.device_put(v[...], NamedSharding(mesh, v.get_metadata()["spec"]))
    ),
    bf16,
  )
  layers = {"BF16": bf16, "FP8": in_fp8(bf16, mesh)}
  print(
    f"jax {jax.__version__}, {flags.ranks} x {jax.devices()[0].device_kind}: "
    f"D={layer.config.dim}, F={layer.config.moe_inter_dim}, {flags.experts} experts, "
    f"top-{layer.config.n_activated_experts}, {flags.runs} runs",
    flush=True,
  )
  for tokens in flags.tokens:
    measure(tokens, layers, mesh, flags)


if __name__ == "__main__":
  main()
