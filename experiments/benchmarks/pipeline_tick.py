"""Times a tick of a pipeline executor: `lax.switch` on the rank's op, then `ppermute`.

    python -m experiments.benchmarks.pipeline_tick [--ranks N] [--ticks 12] [--tiny]

One program, a scan over ticks on a `pipeline` axis. In a tick each rank does what its
table says: nothing, a forward block (products of [tokens, D] with [D, D] matrices), or
a backward block (the products again, then gradients of the input and, summed in FP32
in the carry, of the matrices). Then, outside the branches, as all must meet, every rank
sends activations to the next and gradients to the one before, in a ring.

First the values of a mixed table, in which neighbours do different things, are compared
with a plain loop over ranks on one device. Then the time of a tick with transfers and
without, for tables of one op and for the mixed one. Without, ranks wait for nobody;
"lockstep" is what the table costs where a tick lasts as long as its slowest rank. The
transfers alone are the ticks of idle ranks.

A time is the median over runs of the whole scan, divided by its ticks.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.mesh import PIPELINE, make_mesh
from experiments.benchmarks.moe_layer import calc_diff


def block(w_LDD, x_MD):
  for w_DD in w_LDD:
    x_MD = x_MD @ w_DD
  return x_MD


def forward(w_LDD, x_MD, g_MD, total_LDD):
  return block(w_LDD, x_MD), g_MD, total_LDD


def backward(w_LDD, x_MD, g_MD, total_LDD):
  dw_LDD, dx_MD = jax.vjp(block, w_LDD, x_MD)[1](g_MD)
  return x_MD, dx_MD, total_LDD + dw_LDD.astype(total_LDD.dtype)


def run_op(op, w_LDD, state):
  """0 nothing, 1 forward, 2 backward."""
  return lax.switch(op, (lambda _, *state: state, forward, backward), w_LDD, *state)


def run_ticks(transfer, table_1T, *arrays):
  """One rank's scan; arrays have a leading 1, this rank's share of the axis."""
  w_LDD, *state = (array[0] for array in arrays)
  ranks = lax.axis_size(PIPELINE)
  onward = [(r, (r + 1) % ranks) for r in range(ranks)]
  back = [(there, here) for here, there in onward]

  def tick(state, op):
    x_MD, g_MD, total_LDD = run_op(op, w_LDD, state)
    if transfer:
      x_MD = lax.ppermute(x_MD, PIPELINE, onward)
      g_MD = lax.ppermute(g_MD, PIPELINE, back)
    return (x_MD, g_MD, total_LDD), None

  state, _ = lax.scan(tick, tuple(state), table_1T[0])
  return [part[None] for part in state]


def plain(table_NT, w_NLDD, *state):
  """The same, rank after rank on one device."""
  run, states = jax.jit(run_op), list(zip(*state))
  for ops in table_NT.T:
    xs, gs, totals = zip(*map(run, ops, w_NLDD, states))
    states = list(zip((xs[-1], *xs[:-1]), (*gs[1:], gs[0]), totals))
  return [jnp.stack(parts) for parts in zip(*states)]


def seconds(function, args, flags) -> float:
  """Of one tick."""
  jax.block_until_ready(function(*args))
  times = []
  for _ in range(flags.runs):
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    times.append((time.perf_counter() - start) / flags.ticks)
  return statistics.median(times)


def draw(ranks, flags):
  """Matrices that keep the size of what they multiply, and every rank's state."""
  keys, d = jax.random.split(jax.random.key(0), 3), flags.dim
  w_NLDD = jax.random.normal(keys[0], (ranks, flags.blocks, d, d), jnp.bfloat16)
  shape = ranks, flags.tokens, d
  x_NMD, g_NMD = (jax.random.normal(k, shape, jnp.bfloat16) for k in keys[1:])
  return w_NLDD * d**-0.5, x_NMD, g_NMD, jnp.zeros(w_NLDD.shape, jnp.float32)


def main():
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--ranks", type=int, help="GPUs of the axis; all by default")
  parser.add_argument("--ticks", type=int, default=12)
  parser.add_argument("--tokens", type=int, default=4096)
  parser.add_argument("--dim", type=int, default=7168)
  parser.add_argument("--blocks", type=int, default=4, help="products of a block")
  parser.add_argument("--runs", type=int, default=10, help="runs behind a median")
  parser.add_argument("--tiny", action="store_true", help="small, to try the command")
  flags = parser.parse_args()
  if flags.tiny:
    flags.tokens, flags.dim = 64, 128
  ranks = flags.ranks or len(jax.devices())
  mesh = make_mesh(pipeline=ranks, devices=jax.devices()[:ranks])
  print(
    f"jax {jax.__version__}, {ranks} x {jax.devices()[0].device_kind}: {flags.tokens} "
    f"tokens, D={flags.dim}, {flags.blocks} products a block, {flags.ticks} ticks; a "
    f"rank sends {4 * flags.tokens * flags.dim / 1e6:.1f} MB a tick",
    flush=True,
  )
  split = NamedSharding(mesh, P(PIPELINE))
  arrays = jax.jit(functools.partial(draw, ranks, flags), out_shardings=split)()
  ones = np.ones((ranks, flags.ticks), np.int32)
  mixed = (np.arange(flags.ticks) + np.arange(ranks)[:, None]).astype(np.int32) % 3

  specs = {"in_specs": P(PIPELINE), "out_specs": P(PIPELINE), "check_vma": False}
  apart, together = (
    jax.jit(jax.shard_map(functools.partial(run_ticks, transfer), mesh=mesh, **specs))
    for transfer in (False, True)
  )
  want = plain(mixed, *jax.device_put(arrays, jax.devices()[0]))
  got = together(jax.device_put(mixed, split), *arrays)
  for name, a, b in zip(("activations", "gradients", "weights' gradients"), got, want):
    diff = calc_diff(a, b)
    print(f"  {name}: calc_diff {diff:.1e}", "right" if diff < 1e-5 else "WRONG")
  del want, got

  alone = []
  tables = {"idle": 0 * ones, "forward": ones, "backward": 2 * ones, "mixed": mixed}
  for name, table in tables.items():
    args = jax.device_put(table, split), *arrays
    without, both = (seconds(run, args, flags) * 1e3 for run in (apart, together))
    alone.append(without)
    lockstep = np.array(alone[:3])[table].max(0).mean()
    print(
      f"  {name:8s} ms a tick: {without:8.3f} without transfers (lockstep "
      f"{lockstep:8.3f}), {both:8.3f} with, {both - lockstep:7.3f} above lockstep",
      flush=True,
    )


if __name__ == "__main__":
  main()
