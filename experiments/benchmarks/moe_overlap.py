"""Hides the all-to-all of one micro-batch beside the experts' products of another.

    python -m experiments.benchmarks.moe_overlap [--ranks N] [--split 128:2] [--tiny]

The routed experts of one MoE layer of V3's shape, forward and backward, split over the
GPUs of an expert axis, for two micro-batches A and B: DeepSeek-V3 report, 3.2.1. Of
each, D dispatches tokens, F is the experts' forward pass, C combines; G dispatches the
outputs' gradients, B is the experts' backward pass, H brings the inputs' gradients
home. Tokens and gradients are random, routed as V3 routes them. Plans are made before
and timed apart. Timed are

  no transfers  the same work on rows that have already arrived
  serial        D F C G B H of A, then of B
  transfers     the eight alone
  windows       D(A) | F(A) beside D(B) | F(B) beside C(A) G(A) | B(A) beside C(B) G(B)
                | B(B) beside H(A) | H(B)

and printed with the share of the transfers that windows hide, (serial - windows) /
transfers, of which the first and the last of the eight have nothing beside them. All
give the same bits, which is checked.

`--split P:S` gives products in windows P multiprocessors, 0 for all, and the kernels
that send S. Products share their work out evenly before they start, so each
multiprocessor that a transfer still holds then makes them wait; and as a window is
much longer than a transfer, few are enough for it. FP8 products take them in pairs,
which a transfer may break: P <= 132 - 2 S. Serial transfers use 16, products all.

`--mechanisms` say how a window is made:

  streams  the transfer on a stream of its own, no CUDA graphs
  graphs   the same, with CUDA graphs, in which XLA of jax 0.11.2 puts all in a row
  order    one stream, only the order of windows: what the order alone changes

A mechanism that fails prints its error and the others go on. A time is the median over
runs of `--calls` calls queued at once, divided by their number.
"""

import argparse
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.mesh import EXPERT, make_mesh
from deepseek_jax.parallel import dispatch as d
from deepseek_jax.parallel.windows import WITHOUT_GRAPHS, beside
from deepseek_jax.precision.tiles import TILE, Recipe, quantize_weight
from experiments.benchmarks.all_to_all import attempt, choose_experts
from experiments.benchmarks.moe_layer import seconds
from experiments.benchmarks.moe_steps import Batch, Bf16, Fp8

# Options of the compiler, and the stream of transfers.
MECHANISMS = {"streams": (WITHOUT_GRAPHS, 1), "graphs": ({}, 1)}
MECHANISMS["order"] = (WITHOUT_GRAPHS, None)


def one_after_the_other(steps, move, weights, batches):
  """Of each batch outputs, and gradients of inputs and of weights.

  `move(send, values)` is `send(values)`, or stands for it.
  """
  results = []
  for b in batches:
    x_MD, _ = lax.optimization_barrier((b.x_MD, [done[:2] for done in results]))
    arrived = move(b.dispatch, steps.pack(x_MD, b.gates_MA))
    out_CD, kept = steps.forward(weights, b.plan, arrived)
    (y,) = b.sums(move(b.combine, [out_CD]))
    y, kept, dy_MD = lax.optimization_barrier((y, kept, b.dy_MD))
    arrived = move(b.dispatch, steps.pack_gradient(dy_MD))
    back, d_weights = steps.backward(weights, b.plan, kept, arrived)
    results.append((y, b.sums(move(b.combine, back)), d_weights))
  return results


def recorded(steps, weights, batches):
  """With the results, of each transfer, what was sent and what arrived."""
  moved = []

  def move(send, values):
    moved.append((values, send(values)))
    return moved[-1][1]

  return one_after_the_other(steps, move, weights, batches), moved


def serial(steps, weights, batches):
  return one_after_the_other(steps, lambda send, sent: send(sent), weights, batches)


def without_transfers(steps, weights, batches, moved):
  """What arrives is there; of what would be sent, which is computed, the first rows."""
  all_arrived, all_sent = iter([arrived for _, arrived in moved]), []

  def move(send, values):
    del send
    arrived, values = lax.optimization_barrier((next(all_arrived), values))
    all_sent.append([value[:1] for value in values])
    return arrived

  return one_after_the_other(steps, move, weights, batches), all_sent


def transfers_alone(batches, moved):
  results = []
  sends = [send for b in batches for send in 2 * (b.dispatch, b.combine)]
  for send, (values, _) in zip(sends, moved, strict=True):
    values, results = lax.optimization_barrier((values, results))
    results.append(send(values))
  return results


def in_windows(steps, stream, num_sms, weights, batches):
  """The same as `serial`, the two batches interleaved; `num_sms` of transfers."""
  a, b = batches
  window = functools.partial(beside, stream=stream)

  def forward(batch):
    return functools.partial(steps.forward, weights, batch.plan)

  def backward(batch, kept):
    return functools.partial(steps.backward, weights, batch.plan, kept)

  def gradient(batch):
    return batch.dispatch_each(steps.pack_gradient(batch.dy_MD), num_sms)

  a_arrived = a.dispatch(steps.pack(a.x_MD, a.gates_MA))
  sent = steps.pack(b.x_MD, b.gates_MA)
  sent, a_arrived = lax.optimization_barrier((sent, a_arrived))
  b_arrived, (a_out, a_kept) = window(
    b.dispatch_each(sent, num_sms), forward(a), a_arrived
  )
  (a_home, *a_arrived), (b_out, b_kept) = window(
    a.combine_each([a_out], num_sms) + gradient(a), forward(b), b_arrived
  )
  (b_home, *b_arrived), (a_back, a_d_weights) = window(
    b.combine_each([b_out], num_sms) + gradient(b), backward(a, a_kept), a_arrived
  )
  a_last, (b_back, b_d_weights) = window(
    a.combine_each(a_back, num_sms), backward(b, b_kept), b_arrived
  )
  return [
    (a.sums(a_home), a.sums(a_last), a_d_weights),
    (b.sums(b_home), b.sums(b.combine(b_back)), b_d_weights),
  ]


class Bench:
  """The mesh, two micro-batches on it, and the programs that are timed.

  Outside of a program every array has a leading axis of ranks.
  """

  def __init__(self, flags):
    ranks = flags.ranks or len(jax.devices())
    self.flags, self.ranks, self.experts = flags, ranks, ranks * flags.experts
    self.mesh = make_mesh(expert=ranks, devices=jax.devices()[:ranks])
    m, dim, hidden = flags.tokens, flags.dim, flags.hidden
    self.chosen = [
      jnp.stack([choose_experts(m, 2 * r + i, self.experts) for r in range(ranks)])
      for i in range(2)
    ]
    self.make_plans = self.program(self.plans)
    plans = self.make_plans(self.chosen)
    if any(np.any(plan.overflow) for plan in plans):
      raise ValueError(f"--capacity {flags.capacity} is too small: raise it")
    x_2MD, dy_2MD = (self.draw(key, (m, dim)) for key in (0, 1))
    gates = self.draw(2, self.chosen[0].shape[1:], jnp.float32)
    self.batches = [
      Batch(x_2MD + i, jax.nn.softmax(gates), dy_2MD - i, plan)
      for i, plan in enumerate(plans)
    ]
    shapes = (dim, 2 * hidden), (hidden, dim)
    self.weights = [
      self.draw(3 + i, (flags.experts, *shape), scale=0.02)
      for i, shape in enumerate(shapes)
    ]

  def draw(self, seed, shape, dtype=jnp.bfloat16, scale=1.0):
    def normal():
      x = jax.random.normal(jax.random.key(seed), (self.ranks, *shape), dtype)
      return x * jnp.asarray(scale, dtype)

    return jax.jit(normal, out_shardings=NamedSharding(self.mesh, P(EXPERT)))()

  def plans(self, chosen):
    return [
      d.make_plan(
        experts_MA,
        n_experts=self.experts,
        row_multiple=TILE,
        capacity=self.flags.capacity,
        axes=(EXPERT,),
      )
      for experts_MA in chosen
    ]

  def program(self, fn, options=None):
    """jit of shard_map."""

    def local(*args):
      results = fn(*jax.tree.map(lambda a: a[0], args))
      return jax.tree.map(lambda a: a[None], results)

    specs = {"in_specs": P(EXPERT), "out_specs": P(EXPERT), "check_vma": False}
    options = options if jax.default_backend() == "gpu" else None
    mapped = jax.shard_map(local, mesh=self.mesh, **specs)
    return jax.jit(mapped, compiler_options=options)

  def quantize(self, weights):
    return tuple(quantize_weight(w, 1, 1, Recipe()).codes for w in weights)


def differing(got, want) -> int:
  """Arrays of `got` with other bits than `want`'s."""
  same = jax.jit(lambda a, b: (a == b).all())
  return sum(not same(a, b) for a, b in zip(*map(jax.tree.leaves, (got, want))))


def measure(name, steps, weights, bench):
  flags, batches = bench.flags, bench.batches

  def program(fn, options=WITHOUT_GRAPHS):
    return bench.program(fn, options)

  def report(label, run, args, want=None):
    """Its time in milliseconds; results are compared with `want` first."""
    results, remark = run(*args), ""
    if want is not None:
      wrong = differing(results, want)
      remark = f"   {wrong} arrays DIFFER" if wrong else "   equal"
    del results
    time_ms = seconds(run, args, flags) * 1e3
    print(f"  {name} {label:34s} {time_ms:9.3f} ms{remark}", flush=True)
    return time_ms

  results, moved = program(functools.partial(recorded, steps()))(weights, batches)
  run = program(functools.partial(serial, steps()))
  in_series = report("serial", run, (weights, batches), results)
  run = program(functools.partial(without_transfers, steps()))
  want = results, [[value[:, :1] for value in sent] for sent, _ in moved]
  compute = report("no transfers", run, (weights, batches, moved), want)
  run = program(transfers_alone)
  alone = report("transfers", run, (batches, moved))
  print(
    f"  {name} no transfers / serial {compute / in_series:.3f}; serial is "
    f"{(in_series - compute) / alone:.2f} of the transfers above no transfers"
  )
  for mechanism in flags.mechanisms:
    for split in flags.split:
      options, stream = MECHANISMS[mechanism]
      product_sms, sms = map(int, split.split(":"))
      fn = functools.partial(in_windows, steps(product_sms or None), stream, sms)
      run = program(fn, options)
      label = f"windows, {mechanism}, {product_sms or 'all'} SMs and {sms}"
      time_ms = attempt(
        label, lambda r=run, n=label: report(n, r, (weights, batches), results)
      )
      if time_ms and flags.profile:
        with jax.profiler.trace(f"{flags.profile}/{name.strip()}_{mechanism}_{split}"):
          jax.block_until_ready(run(weights, batches))
      if time_ms:
        print(
          f"  {name}   hidden {(in_series - time_ms) / alone:6.1%} of the transfers; "
          f"no transfers / windows {compute / time_ms:.3f}",
          flush=True,
        )


def main():
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--ranks", type=int, help="GPUs of the axis; all by default")
  parser.add_argument("--tokens", type=int, default=4096, help="a GPU and micro-batch")
  parser.add_argument("--experts", type=int, default=32, help="of a GPU")
  parser.add_argument("--dim", type=int, default=7168)
  parser.add_argument("--hidden", type=int, default=2048)
  parser.add_argument("--capacity", type=float, default=1.1, help="of buffers of rows")
  parser.add_argument("--precisions", nargs="+", default=["BF16", "FP8"])
  parser.add_argument(
    "--mechanisms", nargs="+", default=["streams"], choices=MECHANISMS
  )
  parser.add_argument(
    "--split", nargs="+", default=["0:16", "116:16", "124:4", "128:2"]
  )
  parser.add_argument("--runs", type=int, default=10, help="runs behind a median")
  parser.add_argument("--calls", type=int, default=5, help="calls queued in a run")
  parser.add_argument("--profile", help="folder for profiles of a call in windows")
  parser.add_argument("--tiny", action="store_true", help="small, to try the command")
  flags = parser.parse_args()
  if flags.tiny:
    flags.tokens, flags.dim, flags.hidden, flags.capacity = 64, 256, 128, math.inf
  bench = Bench(flags)
  print(
    f"jax {jax.__version__}, {bench.ranks} x {jax.devices()[0].device_kind}: two "
    f"micro-batches of {flags.tokens} tokens a GPU, D={flags.dim}, F={flags.hidden}, "
    f"{bench.experts} experts, {flags.runs} runs",
    flush=True,
  )
  time_s = seconds(bench.make_plans, (bench.chosen,), flags)
  print(f"  both plans, in none of the following {time_s * 1e3:9.3f} ms", flush=True)
  weights = tuple(bench.weights)
  if "BF16" in flags.precisions:
    measure("BF16", Bf16, weights, bench)
  if "FP8" in flags.precisions:
    codes = bench.program(bench.quantize)(weights)
    measure("FP8 ", Fp8, codes, bench)


if __name__ == "__main__":
  main()
