"""Times the all-to-all of expert parallelism among all GPUs, beside JAX's own.

    python -m experiments.benchmarks.all_to_all [--ranks N ...] [--tune] [--tiny]

One GPU sends to itself by the same code. Tokens are routed as DeepSeek-V3 routes them
(256 experts, 8 groups keep 4, top 8) with random scores; their copies are counted. For
each number of tokens a GPU it checks values, then prints medians for dispatch (FP8
codes and FP32 scales, 7,392 bytes a token) and combine (BF16, without its sum);
backward, the two change places. Beside them:

  dense      lax.all_to_all of as many bytes in equal shares, one array, nothing to
             gather: the bar
  ragged     lax.ragged_all_to_all of the same rows, already in order (`--ragged`)
  reference  our own, through lax.all_to_all

and, for `--latency` tokens a GPU, decoding: rows laid out by expert. "plan" is the time
to compute a route, its exchange of counts included; "whole" of plan, dispatch, combine
and sum together.

A time is the median over runs of a program of `--repeats` calls, one after the other,
divided by their number. GB/s count each row sent, to this GPU too. A contender that
fails prints its error and the others go on.
"""

import argparse
import functools
import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import all_to_all as a2a
from kernels_pallas.all_to_all import gpu

AXIS = "expert"
DIM, EXPERTS, GROUPS, KEPT_GROUPS, ACTIVE = 7168, 256, 8, 4, 8
BLOCK = 128  # channels of one scale


def choose_experts(tokens: int, seed: int, experts: int = EXPERTS) -> np.ndarray:
  """[tokens, 8] experts by group-limited top-k of random scores."""
  scores = np.random.default_rng(seed).normal(size=(tokens, GROUPS, experts // GROUPS))
  best_two = np.sort(scores, axis=-1)[..., -2:].sum(-1)
  kept = np.argsort(-best_two, axis=-1)[:, :KEPT_GROUPS]
  masked = np.full_like(scores, -np.inf)
  rows = np.arange(tokens)[:, None]
  masked[rows, kept] = scores[rows, kept]
  return np.argsort(-masked.reshape(tokens, -1), axis=-1)[:, :ACTIVE].astype(np.int32)


class Bench:
  """A mesh of some GPUs, tokens on each, and the programs timed on them."""

  def __init__(self, ranks: int, tokens: int, flags):
    self.ranks, self.tokens, self.flags = ranks, tokens, flags
    self.mesh = Mesh(np.array(jax.devices()[:ranks]), (AXIS,))
    self.dim = 512 if flags.tiny else DIM
    everyone = tokens * ranks
    keys = jax.random.split(jax.random.key(0), 3)
    self.x = self.put(jax.random.normal(keys[0], (everyone, self.dim), jnp.bfloat16))
    codes = jax.random.normal(keys[1], (everyone, self.dim))
    self.codes = self.put(codes.astype(jnp.float8_e4m3fn))
    self.scales = self.put(jnp.exp2(jnp.floor(codes[:, : self.dim // BLOCK])))
    chosen = np.concatenate([choose_experts(tokens, seed) for seed in range(ranks)])
    self.copies = np.array(
      [len(set(row)) for row in (chosen // (EXPERTS // ranks)).tolist()]
    )
    self.experts = self.put(jnp.asarray(chosen))

  def put(self, x):
    return jax.device_put(x, NamedSharding(self.mesh, P(AXIS)))

  def program(self, fn):
    return jax.jit(
      jax.shard_map(
        fn, mesh=self.mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False
      )
    )

  def plan(self, experts):
    local = EXPERTS // self.ranks
    return a2a.plan_ranks(experts // local, self.ranks * self.tokens, AXIS)

  def rows_sent(self) -> int:
    """By the busiest GPU, and received by the busiest: what a time is divided by."""
    return int(self.copies.reshape(self.ranks, -1).sum(1).max())

  def seconds(self, fn, *args, repeats=None, chained=False) -> float:
    """Median time of fn(*local args) in a program of several, one after the other.

    Chained, each takes what the one before gave; else its integers wait for that.
    """
    repeats = repeats or self.flags.repeats

    fn = jax.jit(fn)  # traced and lowered once, not for each call

    def several(*args):
      out = None
      for _ in range(repeats):
        out = fn(*args)
        args = (out,) if chained else _after(out, args)
      return jax.tree.map(lambda leaf: leaf.reshape(-1)[:8], out)

    run = self.program(several)
    jax.block_until_ready(run(*args))
    times = []
    for _ in range(self.flags.runs):
      start = time.perf_counter()
      jax.block_until_ready(run(*args))
      times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times)


def _after(out, args):
  """`args`, but XLA cannot tell before `out` is known: equal calls are not merged."""
  first = jax.tree.leaves(out)[0].reshape(-1)[:1].astype(jnp.float32)
  wait = (first == 12345.678).astype(jnp.int32)[0]
  return jax.tree.map(lambda a: a + wait if a.dtype == jnp.int32 else a, args)


def dispatch(route, codes, scales, layout=None, impl="gpu"):
  if impl == "gpu":
    send = functools.partial(gpu.send_rows, layout=layout)
  else:
    send = a2a.reference.send_rows
  count = jnp.int32(codes.shape[0])
  received = route.counts_L.sum()
  return send([codes, scales], route.address_MA, count, received, route.rows, AXIS)


def home(route, y, layout=None, impl="gpu"):
  if impl == "gpu":
    send = functools.partial(gpu.send_rows, layout=layout)
  else:
    send = a2a.reference.send_rows
  count, back = route.counts_L.sum(), (route.home_MA >= 0).sum(dtype=jnp.int32)
  address = route.return_R[:, None]
  return send([y], address, count, back, route.home_rows, AXIS, source_M=route.source_R)


def dense(payload):
  return lax.all_to_all(payload, AXIS, 0, 0)


def ragged(rows, out, sizes):
  """Rows in order of their destination; `sizes` of each."""
  offsets = jnp.cumsum(sizes) - sizes
  received = lax.all_to_all(sizes, AXIS, 0, 0, tiled=True)
  places = jnp.cumsum(received) - received
  places = lax.all_to_all(places, AXIS, 0, 0, tiled=True)
  return lax.ragged_all_to_all(
    rows, out, offsets, sizes, places, received, axis_name=AXIS
  )


def attempt(name, measure):
  """The time, or None and a line that says what failed."""
  try:
    return measure()
  except Exception as problem:
    text = " ".join(str(problem).split())[:400]
    print(f"  {name:28s} failed: {type(problem).__name__}: {text}", flush=True)
    return None


def report(name, seconds, size, bar=None):
  if seconds is not None:
    ratio = f"   {bar / seconds:5.2f} of dense" if bar else ""
    print(
      f"  {name:28s} {seconds * 1e6:10.1f} us {size / seconds / 1e9:8.1f} GB/s{ratio}",
      flush=True,
    )


def routed(bench):
  """The route and what dispatch leaves on each rank, made by the reference."""

  def make(x, experts):
    route = bench.plan(experts)
    return route, a2a.dispatch(x, route, "reference")

  def split(x, experts):  # scalars have no axis to be joined along
    route, y = make(x, experts)
    return jax.tree.map(lambda a: a.reshape(-1) if a.ndim == 0 else a, (route, y))

  route, y = bench.program(split)(bench.x, bench.experts)
  return route, y


def check(bench, route, y):
  """Bits of both directions against the reference's, and copies of x against x."""

  def body(route, codes, scales, x, y):
    differ = []
    for send, payload in ((dispatch, (codes, scales)), (home, (y,))):
      used = route.counts_L if send is dispatch else route.home_MA >= 0
      for got, want in zip(
        send(route, *payload), send(route, *payload, impl="reference")
      ):
        rows = jnp.arange(got.shape[0]) < used.sum()
        bits = jnp.dtype(f"uint{8 * got.dtype.itemsize}")
        got, want = (lax.bitcast_convert_type(a, bits) for a in (got, want))
        differ.append(((got != want).any(-1) & rows).sum())
    back = a2a.combine(a2a.dispatch(x, route, "gpu"), route, "gpu")
    copies = (route.address_MA >= 0).sum(1, keepdims=True)
    want = (x.astype(jnp.float32) * copies).astype(x.dtype)
    differ.append((back != want).any(-1).sum())
    return jnp.stack(differ)[None]

  wrong = bench.program(body)(route, bench.codes, bench.scales, bench.x, y)
  wrong = np.asarray(wrong).sum(0)
  print(f"  rows that differ: {wrong.tolist()}", "WRONG" if wrong.any() else "(right)")


def large(ranks, tokens, flags):
  bench = Bench(ranks, tokens, flags)
  copies = bench.copies.mean()
  print(
    f"\n{ranks} GPUs, {tokens} tokens each, {copies:.3f} copies a token of at most "
    f"{min(ranks, KEPT_GROUPS)}",
    flush=True,
  )
  route, y = routed(bench)
  attempt("check", lambda: check(bench, route, y))
  rows = bench.rows_sent()
  for name, send, payload, words in (
    ("dispatch FP8", dispatch, (bench.codes, bench.scales), bench.dim // 4),
    ("combine BF16", home, (y,), bench.dim // 2),
  ):
    words += bench.dim // BLOCK if send is dispatch else 0
    size, share = rows * words * 4, -(-rows // ranks)
    parts = bench.put(jnp.ones((ranks * ranks, share, words), jnp.int32))
    bar = attempt("dense", lambda p=parts: bench.seconds(dense, p, chained=True))
    report(f"{name}: dense", bar, size)
    time_s = attempt(name, lambda s=send, p=payload: bench.seconds(s, route, *p))
    report(name, time_s, size, bar)
    if flags.tune:
      tune(bench, send, (route, *payload), size, bar)
    if flags.ragged:
      time_s = attempt("ragged", lambda w=words: ragged_time(bench, w))
      report(f"{name}: ragged", time_s, size, bar)
  whole(bench)


def ragged_time(bench, words):
  counts = bench.copies.reshape(bench.ranks, -1).sum(1)
  most = int(counts.max())
  share = [most // bench.ranks] * (bench.ranks - 1)
  sizes = np.array([*share, most - sum(share)], np.int32)
  everyone = bench.ranks
  rows = bench.put(jnp.ones((everyone * most, words), jnp.int32))
  out = bench.put(jnp.zeros((everyone * 2 * most, words), jnp.int32))
  return bench.seconds(
    ragged, rows, out, bench.put(jnp.asarray(np.tile(sizes, everyone))), repeats=1
  )


def tune(bench, send, args, size, bar):
  for sms, rings in itertools.product((8, 12, 16, 20, 24), (2, 4)):
    layout = gpu.Layout(sms=sms, rings=rings)
    name = f"  {sms} SMs, {rings} rings"
    run = functools.partial(send, layout=layout)
    report(name, attempt(name, lambda r=run: bench.seconds(r, *args)), size, bar)


def whole(bench):
  """Plan, dispatch in BF16, combine with its sum; and the plan alone."""

  def everything(x, experts):
    route = bench.plan(experts)
    return a2a.combine(a2a.dispatch(x, route), route)

  def plan(experts):
    route = bench.plan(experts)
    return route.address_MA, route.home_MA, route.return_R

  for name, fn, args in (
    ("plan", plan, (bench.experts,)),
    ("whole, BF16", everything, (bench.x, bench.experts)),
  ):
    time_s = attempt(name, lambda f=fn, a=args: bench.seconds(f, *a))
    if time_s:
      print(f"  {name:28s} {time_s * 1e6:10.1f} us", flush=True)


def latency(ranks, tokens, flags):
  bench = Bench(ranks, tokens, flags)
  local = EXPERTS // ranks
  print(f"\ndecoding: {ranks} GPUs, {tokens} tokens each, a row an expert", flush=True)

  def plan(experts):
    route = a2a.plan_experts(experts, local, ranks * tokens, AXIS)
    return jax.tree.map(lambda a: a.reshape(-1) if a.ndim == 0 else a, route)

  route = bench.program(plan)(bench.experts)
  y = bench.program(lambda r, x: a2a.dispatch(x, r, "gpu"))(route, bench.x)
  words = bench.dim // 4 + bench.dim // BLOCK
  rows = tokens * ACTIVE
  repeats = 2 * flags.repeats
  for name, send, payload, width in (
    ("dispatch FP8", dispatch, (bench.codes, bench.scales), words),
    ("combine BF16", home, (y,), bench.dim // 2),
  ):
    parts = bench.put(jnp.ones((ranks * ranks, rows // ranks, width), jnp.int32))
    size = rows * width * 4
    bar = attempt(
      "dense", lambda p=parts: bench.seconds(dense, p, repeats=repeats, chained=True)
    )
    report(f"{name}: dense", bar, size)
    for impl in ("gpu", "reference"):
      run = functools.partial(send, impl=impl)
      args = (route, *payload)
      time_s = attempt(
        impl, lambda r=run, a=args: bench.seconds(r, *a, repeats=repeats)
      )
      report(f"{name}: {impl}", time_s, size, bar)
  time_s = attempt("plan", lambda: bench.seconds(plan, bench.experts, repeats=repeats))
  report("plan", time_s, 0)


def main():
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--ranks", type=int, nargs="+", help="numbers of GPUs to use")
  parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 8192])
  parser.add_argument("--latency", type=int, nargs="*", default=[128])
  parser.add_argument("--tune", action="store_true", help="sweep SMs and rings too")
  parser.add_argument("--ragged", action="store_true", help="time it too: it is slow")
  parser.add_argument("--tiny", action="store_true", help="rows of 512 values")
  parser.add_argument("--runs", type=int, default=15, help="runs behind a median")
  parser.add_argument("--repeats", type=int, default=20, help="calls in a program")
  flags = parser.parse_args()
  devices = jax.devices()
  print(
    f"jax {jax.__version__}, {len(devices)} x {devices[0].device_kind}, "
    f"{flags.runs} runs, {gpu.Layout()}"
  )
  for ranks in flags.ranks or sorted({1, len(devices)}):
    for tokens in flags.tokens:
      attempt("section", lambda r=ranks, t=tokens: large(r, t, flags))
    for tokens in flags.latency:
      attempt("section", lambda r=ranks, t=tokens: latency(r, t, flags))


if __name__ == "__main__":
  main()
