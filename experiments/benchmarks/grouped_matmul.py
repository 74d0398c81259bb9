"""Times the grouped matrix product on one GPU, beside JAX's own ways to do it.

    python -m experiments.benchmarks.grouped_matmul [--tune | --many] [--tiny]

For each shape and product (forward, dx, dw) it checks values against FP32 products of
the first, a middle, the last and the largest group, then prints medians:

  ours          kernels_pallas.grouped_matmul, impl='gpu'
  pallas mgpu   ragged_dot_mgpu / transposed_ragged_dot_mgpu, which ship with JAX
  einsum        one batched product of equal groups: the ceiling, no real routing
  lax           lax.ragged_dot(_general): XLA's

A time is the median over runs of `--calls` calls queued at once, divided by their
number. Groups are equal, so that the einsum does the same work. An implementation that
fails prints its error and the others go on.

`--many` times our kernels with 256 groups, equal and uneven ones, in turns.
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

from experiments.benchmarks.fp8_matmul import jax_queues, medians
from experiments.benchmarks.grouped_matmul_fp8 import uneven
from kernels_pallas.grouped_matmul import gpu

# Groups, rows of each, D, F.
SHAPES = [
  (8, 4096, 4096, 7168),
  (8, 4096, 7168, 2048),
  (64, 1536, 2048, 2816),
  (64, 1536, 1408, 2048),
  (4, 8192, 4096, 7168),
  (4, 8192, 7168, 2048),
]
MANY = [(256, 128, 4096, 7168), (256, 128, 7168, 2048)]
TINY = [(4, 256, 256, 512)]
PRODUCTS = ("forward", "dx", "dw")
MGPU_BLOCKS = {"block_m": 128, "block_n": 128, "block_k": 64}
MGPU_BLOCKS |= {"max_concurrent_steps": 4, "grid_block_n": 8}
_DW = lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((0,), (0,)), ((), ())),
  lhs_ragged_dimensions=[0],
  rhs_group_dimensions=[],
)


def ours(product, tiling=None):
  return {
    "forward": lambda x, w, dy, s: gpu.multiply(x, w, s, tiling=tiling),
    "dx": lambda x, w, dy, s: gpu.multiply(dy, w, s, True, tiling=tiling),
    "dw": lambda x, w, dy, s: gpu.multiply_rows(x, dy, s, x.dtype, tiling=tiling),
  }[product]


def pallas_mgpu(product, **blocks):
  from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu as forward
  from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu as transposed

  blocks = {**MGPU_BLOCKS, **blocks}
  dot = functools.partial(forward.ragged_dot, **blocks)
  return {
    "forward": lambda x, w, dy, s: dot(x, w, group_sizes=s),
    "dx": lambda x, w, dy, s: dot(dy, w, group_sizes=s, transpose_rhs=True),
    "dw": lambda x, w, dy, s: transposed.transposed_ragged_dot(
      x, dy, group_sizes=s, **blocks
    ),
  }[product]


def einsum(product):
  def split(a_ZD, s):
    return a_ZD.reshape(s.shape[0], -1, a_ZD.shape[1])

  def join(a_EZD):
    return a_EZD.reshape(-1, a_EZD.shape[2])

  return {
    "forward": lambda x, w, dy, s: join(jnp.einsum("ezd,edf->ezf", split(x, s), w)),
    "dx": lambda x, w, dy, s: join(jnp.einsum("ezf,edf->ezd", split(dy, s), w)),
    "dw": lambda x, w, dy, s: jnp.einsum("ezd,ezf->edf", split(x, s), split(dy, s)),
  }[product]


def lax_ragged(product):
  return {
    "forward": lambda x, w, dy, s: lax.ragged_dot(x, w, s),
    "dx": lambda x, w, dy, s: lax.ragged_dot(dy, jnp.swapaxes(w, 1, 2), s),
    "dw": lambda x, w, dy, s: lax.ragged_dot_general(x, dy, s, _DW),
  }[product]


CONTENDERS = {
  "ours": ours,
  "pallas mgpu": pallas_mgpu,
  "einsum": einsum,
  "lax": lax_ragged,
}
PEERS = ("einsum", "lax")


def make_inputs(groups, rows, d, f):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (groups * rows, d), jnp.bfloat16)
  w = jax.random.normal(keys[1], (groups, d, f), jnp.bfloat16)
  dy = jax.random.normal(keys[2], (groups * rows, f), jnp.bfloat16)
  return x, w, dy, jnp.full((groups,), rows, jnp.int32)


def worst_error(product, got, x, w, dy, s) -> float:
  """Largest error of four groups, as a share of the bound that a test would set.

  They are the first, a middle, the last and the largest one.

  The bound of an element is what FP32 accumulation and one rounding to BF16 allow;
  see tests/kernels_pallas/test_grouped_matmul.py. The FP32 products it is held
  against err themselves, hence twice the accumulation's share.
  """
  groups, sizes = s.shape[0], np.asarray(s)
  ends = np.cumsum(sizes)
  exact = functools.partial(jnp.einsum, precision="highest")
  worst = 0.0
  for e in sorted({0, groups // 2, groups - 1, int(sizes.argmax())}):
    mine = slice(ends[e] - sizes[e], ends[e])
    a, b, equation = {
      "forward": (x[mine], w[e], "zd,df->zf"),
      "dx": (dy[mine], w[e], "zf,df->zd"),
      "dw": (x[mine], dy[mine], "zd,zf->df"),
    }[product]
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    terms = sizes[e] if product == "dw" else a.shape[1]
    want, magnitude = exact(equation, a, b), exact(equation, abs(a), abs(b))
    part = (got[e] if product == "dw" else got[mine]).astype(jnp.float32)
    bound = 2 * terms * 2.0**-24 * magnitude + 2.0**-8 * abs(want)
    # Of an empty group nothing is left, or zeros that have no bound.
    share = jnp.where((part == want), 0.0, abs(part - want) / bound)
    share = jnp.max(share, initial=0.0)
    worst = max(worst, float(jnp.where(jnp.isnan(share), jnp.inf, share)))
  return worst


def seconds(function, args, calls, runs) -> float:
  jax.block_until_ready(function(*args))  # compiled and checked before: warm-up
  times = []
  for _ in range(runs):
    start = time.perf_counter()
    for _ in range(calls):
      result = function(*args)
    jax.block_until_ready(result)
    times.append((time.perf_counter() - start) / calls)
  return statistics.median(times)


def measure(make, product, args, flags) -> tuple[float, float]:
  """Median seconds, and the error's share of its bound."""
  function = jax.jit(make(product))
  error = worst_error(product, jax.block_until_ready(function(*args)), *args)
  return seconds(function, args, flags.calls, flags.runs), error


def report(shape, args, flags):
  groups, rows, d, f = shape
  flop = 2 * groups * rows * d * f
  for product in PRODUCTS:
    print(f"\n{product}: {groups} groups x {rows} rows, D={d}, F={f}", flush=True)
    times, lines = {}, []
    for name, make in CONTENDERS.items():
      try:
        time_s, error = measure(make, product, args, flags)
      except Exception as problem:
        print(f"  {name:12s} failed: {type(problem).__name__}: {str(problem)[:300]}")
        continue
      times[name] = time_s
      lines.append((name, time_s, error))
    for name, time_s, error in lines:
      ratio = " ".join(
        f"{times[peer] / time_s:5.2f} of {peer}" for peer in PEERS if peer in times
      )
      verdict = "" if error <= 1 else "   WRONG"
      print(
        f"  {name:12s} {time_s * 1e3:9.3f} ms {flop / time_s / 1e12:7.1f} TFLOP/s "
        f"{ratio}   error {error:.2f} of its bound{verdict}",
        flush=True,
      )


def report_many(shape, args, flags):
  """Equal groups beside uneven ones; some of these are empty."""
  groups, rows, d, f = shape
  x, w, dy, equal = args
  sizes = {"equal": equal, "uneven": uneven(groups * rows, groups)}
  for product in PRODUCTS:
    function, queues = jax.jit(ours(product)), {}
    print(f"\n{product}: {groups} groups of {rows} rows in the mean, D={d}, F={f}")
    for name, s in sizes.items():
      error = worst_error(product, function(x, w, dy, s), x, w, dy, s)
      verdict = "" if error <= 1 else "   WRONG"
      print(f"  {name:12s} error {error:.2f} of its bound{verdict}", flush=True)
      queues |= jax_queues({name: function}, [(x, w, dy, s)])
    times = medians(queues, 1, 0.05, flags.runs)
    for name, time_s in times.items():
      rate = 2 * groups * rows * d * f / time_s / 1e12
      ratio = f"{times['equal'] / time_s:5.2f} of equal"
      print(f"  {name:12s} {time_s * 1e3:9.3f} ms {rate:7.1f} TFLOP/s {ratio}")


def tune(shape, args, flags):
  """Times our kernels over tile sizes, and JAX's over a few of its own, best first."""
  groups, rows, d, f = shape
  flop = 2 * groups * rows * d * f
  options = {
    f"ours columns={c} stages={s} snake={n} cluster={b}": functools.partial(
      ours, tiling=gpu.Tiling(columns=c, stages=s, snake=n, cluster=b)
    )
    for (c, s), n, b in itertools.product(
      [(128, 6), (192, 4), (256, 4)], (2, 8, 16, 32), (1, 2)
    )
  }
  options |= {
    f"pallas mgpu n={n} steps={s} grid={g}": functools.partial(
      pallas_mgpu, block_n=n, max_concurrent_steps=s, grid_block_n=g
    )
    for n, s, g in itertools.product((128, 256), (4,), (4, 16))
  }
  for product in PRODUCTS:
    print(f"\ntune {product}: {groups} groups x {rows} rows, D={d}, F={f}", flush=True)
    results = []
    for name, make in options.items():
      try:
        time_s, error = measure(make, product, args, flags)
        results.append((time_s, name, error))
      except Exception as problem:
        print(f"  {name} failed: {type(problem).__name__}: {str(problem)[:200]}")
    for time_s, name, error in sorted(results)[:8]:
      verdict = "" if error <= 1 else "   WRONG"
      print(f"  {flop / time_s / 1e12:7.1f} TFLOP/s {name}{verdict}", flush=True)


def main():
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  mode = parser.add_mutually_exclusive_group()
  mode.add_argument("--tune", action="store_true", help="sweep tile sizes instead")
  mode.add_argument("--many", action="store_true", help="256 groups, equal or not")
  parser.add_argument("--tiny", action="store_true", help="one small shape")
  parser.add_argument("--shape", type=int, help="only the shape of this index")
  parser.add_argument("--runs", type=int, default=20, help="runs behind a median")
  parser.add_argument("--calls", type=int, default=5, help="calls queued in a run")
  flags = parser.parse_args()
  device = jax.devices()[0]
  print(f"jax {jax.__version__}, {device.device_kind}, {flags.runs} runs")
  run = tune if flags.tune else report_many if flags.many else report
  shapes = TINY if flags.tiny else MANY if flags.many else SHAPES
  for shape in shapes if flags.shape is None else [shapes[flags.shape]]:
    run(shape, make_inputs(*shape), flags)


if __name__ == "__main__":
  main()
