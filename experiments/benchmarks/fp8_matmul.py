"""Times the block-scaled FP8 products on one GPU, beside cuBLASLt's and XLA's.

    python -m experiments.benchmarks.fp8_matmul [--retune] [--rows 4096 8192]

For DeepSeek-V3's shapes and each number of rows (tokens) it checks values against the
FP32 reference, then prints medians of rounds in which the contenders take turns:

  ours        kernels_pallas.fp8_matmul, impl='gpu'
  cuBLASLt    torch._scaled_mm with the same scales (1x128 by 128x128, and for the
              weight gradient 1x128 by 1x128), where torch is there
  DeepGEMM    DeepSeek's own kernels, forward, where `deep_gemm` is installed; beside
              JAX it may need LD_PRELOAD=libstdc++.so.6
  one scale   XLA's FP8 dot with one scale a tensor, for many rows: the ceiling
  copy        for few rows, where moving the weights is what counts: half the bytes read
              and half written by XLA

`--retune` times tilings instead and prints the rows of kernels_pallas/fp8_matmul/
tilings.py. Inputs are random normal, several sets in turn, so that weights do not stay
in L2. A time is that of a queue of calls, divided by their number; for few rows it is
launched while the device is busy (ahead.py), because the host takes as long as it does.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import statistics
import time
from concurrent import futures

import jax
import jax.numpy as jnp

from experiments.benchmarks.ahead import (
  MOST,
  seconds_behind_work,
  torch_seconds_behind_work,
)
from kernels_pallas import fp8_matmul as op
from kernels_pallas.fp8_matmul import gpu, reference, tilings
from kernels_pallas.fp8_matmul.persistent import Tiling

# (N, K) of DeepSeek-V3's Linears.
SHAPES = [
  (2112, 7168),
  (24576, 1536),
  (32768, 512),
  (7168, 16384),
  (4096, 7168),
  (7168, 2048),
]
SMALL_ROWS = 256  # up to here the time is that of moving the weights
PRODUCTS = ("forward", "dw")


@functools.partial(jax.jit, static_argnums=(1, 2))
def codes(key, rows, columns):
  """Random normal values quantised by 1 x 128, and their scales, contraction first."""
  x = jax.random.normal(key, (rows, columns // 128, 128), jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=2) / 448
  x = (x / scale[:, :, None]).astype(jnp.float8_e4m3fn)
  return x.reshape(rows, columns), scale.T


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def make_inputs(product, m, n, k, key):
  keys = jax.random.split(key, 3)
  if product == "dw":
    return *codes(keys[0], n, m), *codes(keys[1], k, m)
  b, _ = codes(keys[1], n, k)
  sb = jax.random.uniform(keys[2], (-(-n // 128), k // 128), jnp.float32, 0.5, 1.5)
  return *codes(keys[0], m, k), b, sb


def ours(product, tiling=None):
  if product == "dw":
    if tiling is None:
      return functools.partial(op.fp8_matmul_dw, impl="gpu")
    return lambda *a: gpu.multiply_tokens(*a, tiling=tiling)[0]
  if tiling is None:
    return functools.partial(op.fp8_matmul, impl="gpu")
  return lambda a, sa, b, sb: gpu.multiply(a, sa, b[None], sb[None], tiling=tiling)


def one_scale(product):
  """XLA's own product of the codes; the one scale is left out."""
  dtype = jnp.float32 if product == "dw" else jnp.bfloat16
  return lambda a, sa, b, sb: jnp.dot(a, b.T, preferred_element_type=dtype)


@functools.partial(jax.jit, static_argnums=0)
def exact(product, inputs):
  """The FP32 product of the same codes and scales."""
  multiply = reference.multiply_tokens if product == "dw" else reference.multiply
  return multiply(*inputs).astype(jnp.float32)


@jax.jit
def worst_error(got, want):
  """The worst row's relative error; NaN where anything is."""
  got = got.astype(jnp.float32)
  return jnp.max(jnp.linalg.norm(got - want, axis=1) / jnp.linalg.norm(want, axis=1))


def jax_queues(functions, sets, want=None) -> dict:
  """For each function a queue: one call for every set of inputs, many times.

  They are compiled side by side. One that fails, or whose first result is not `want`
  (where that is given), says so and is left out.
  """

  def compiled(function):
    run = jax.jit(lambda sets: [function(*inputs) for inputs in sets])
    return run.lower(sets).compile()

  def checked(run):
    result = run(sets)
    if want is not None and not (error := float(worst_error(result[0], want))) < 5e-3:
      raise ValueError(f"WRONG: error {error}")

    def queue(times, behind_work):
      def launch():
        for _ in range(times):  # what an earlier run made is freed
          result = run(sets)
        return result

      if behind_work:
        return seconds_behind_work(launch)
      start = time.perf_counter()
      jax.block_until_ready(launch())
      return time.perf_counter() - start

    return queue

  queues = {}
  with futures.ThreadPoolExecutor(6) as pool:
    jobs = {name: pool.submit(compiled, f) for name, f in functions.items()}
    futures.wait(jobs.values())
  for name, job in jobs.items():
    try:
      queues[name] = checked(job.result())
    except Exception as problem:
      print(f"  {name}: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
  return queues


def torch_codes(rows, columns):
  """As `codes`, in PyTorch; the scales [rows, columns / 128]."""
  import torch  # pyright: ignore[reportMissingImports]

  x = torch.randn(rows, columns // 128, 128, device="cuda")
  scale = x.abs().amax(2) / 448
  return (x / scale[:, :, None]).to(torch.float8_e4m3fn).reshape(rows, columns), scale


def block_scales(n, k):
  import torch  # pyright: ignore[reportMissingImports]

  return torch.rand(-(-n // 128), k // 128, device="cuda")


def cublaslt_call(product, m, n, k):
  """cuBLASLt's product of random inputs of its own."""
  import torch  # pyright: ignore[reportMissingImports]

  def codes_by_token(rows, columns):
    x, scale = torch_codes(rows, columns)
    return x, scale.t().contiguous().t()

  if product == "dw":
    (a, sa), (b, sb) = codes_by_token(n, m), codes_by_token(k, m)
    dtype = torch.float32
  else:
    (a, sa), (b, _) = codes_by_token(m, k), torch_codes(n, k)
    sb, dtype = block_scales(n, k), torch.bfloat16
  scales = {"scale_a": sa, "scale_b": sb.t()}
  return lambda: torch._scaled_mm(a, b.t(), **scales, out_dtype=dtype)


def deep_gemm_call(m, n, k):
  """DeepGEMM's forward product of random inputs of its own, scales in its layout."""
  import deep_gemm  # pyright: ignore[reportMissingImports]
  import torch  # pyright: ignore[reportMissingImports]

  (a, sa), (b, _) = torch_codes(m, k), torch_codes(n, k)
  left = a, deep_gemm.get_mn_major_tma_aligned_tensor(sa)
  right = b, block_scales(n, k)
  out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
  return lambda: deep_gemm.fp8_gemm_nt(left, right, out)


def peers(product, m, n, k) -> dict:
  """By name, what makes one of the peer's calls."""
  found = {"cuBLASLt": functools.partial(cublaslt_call, product, m, n, k)}
  if product == "forward" and importlib.util.find_spec("deep_gemm"):
    found["DeepGEMM"] = functools.partial(deep_gemm_call, m, n, k)
  return found


def torch_queue(make_call, number):
  """A peer's calls on several sets of inputs, as a replayed CUDA graph."""
  import torch  # pyright: ignore[reportMissingImports]

  calls = [make_call() for _ in range(number)]

  def once():
    for call in calls:
      call()

  once()
  torch.cuda.synchronize()
  graph = torch.cuda.CUDAGraph()
  with torch.cuda.graph(graph):
    once()

  def queue(times, behind_work, _inputs_of=calls):  # which the graph reads
    def launch():
      for _ in range(times):
        graph.replay()

    if behind_work:
      return torch_seconds_behind_work(launch)
    start = time.perf_counter()
    launch()
    torch.cuda.synchronize()
    return time.perf_counter() - start

  return queue


def medians(queues, calls, seconds, rounds, behind_work=False) -> dict[str, float]:
  """Median seconds of one call; contenders take turns of about `seconds`.

  The clock follows the power of what ran before, so a turn begins with as many calls
  that are not timed. With `behind_work` (where all follow the same) the host's launches
  do not count.
  """
  times = {}
  for name, queue in queues.items():
    queue(3, False)  # the first takes longer to launch
    number = max(2, round(seconds / (queue(2, behind_work) / 2)))
    times[name] = (min(number, MOST) if behind_work else number, [])
  for _ in range(rounds):
    for name, queue in queues.items():
      number, results = times[name]
      if not behind_work:
        queue(number, False)
      results.append(queue(number, behind_work) / number / calls)
  return {name: statistics.median(results) for name, (_, results) in times.items()}


def sets_of(product, m, n, k, small=4):
  """Several sets of inputs: more where the weights would fit in L2."""
  number = 16 if m <= SMALL_ROWS else small
  key = jax.random.key(m + n + k)
  return [
    make_inputs(product, m, n, k, jax.random.fold_in(key, i)) for i in range(number)
  ]


def bytes_moved(product, m, n, k) -> int:
  if product == "dw":
    return m * n + m * k + 4 * n * k
  return m * k + n * k + 2 * m * n


def copies(bytes_: int, number: int) -> dict:
  """The queue of XLA's negation of BF16, which moves as many bytes."""
  keys = jax.random.split(jax.random.key(1), number)
  elements = bytes_ // 4  # read once and written once
  sets = [(jax.random.normal(key, (elements,), jnp.bfloat16),) for key in keys]
  return jax_queues({"copy": jnp.negative}, sets)


def line(name, seconds, product, m, n, k, against=None) -> str:
  moved = bytes_moved(product, m, n, k)
  text = f"  {name:40s} {seconds * 1e6:8.1f} us {2 * m * n * k / seconds / 1e12:7.1f}"
  text += f" TFLOP/s {moved / seconds / 1e9:6.0f} GB/s"
  return text + (f"  {against / seconds:5.2f} of cuBLASLt" if against else "")


def report(product, m, n, k, flags) -> float | None:
  """Prints a shape's table; the ratio to cuBLASLt where that ran."""
  sets = sets_of(product, m, n, k)
  want = exact(product, sets[0]) if flags.check else None
  queues = jax_queues({"ours": ours(product)}, sets, want)
  few = m <= SMALL_ROWS
  if not few:
    queues |= jax_queues({"one scale": one_scale(product)}, sets)
  for name, make_call in peers(product, m, n, k).items():
    try:
      queues[name] = torch_queue(make_call, len(sets))
    except Exception as problem:
      print(f"  {name}: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
  if few:
    queues |= copies(bytes_moved(product, m, n, k), len(sets))
  times = medians(queues, len(sets), flags.seconds, flags.rounds, behind_work=few)
  print(f"{product} M={m} N={n} K={k}")
  for name, seconds in times.items():
    text = line(name, seconds, product, m, n, k, times.get("cuBLASLt"))
    if "copy" in times:
      text += f" {times['copy'] / seconds:5.2f} of a copy"
    print(text, flush=True)
  both = times.keys() >= {"ours", "cuBLASLt"}
  return times["cuBLASLt"] / times["ours"] if both else None


def candidates(product, m, snakes):
  """The tilings of the table, others that fit in shared memory and are worth a try."""
  if product == "forward" and m <= SMALL_ROWS:
    return _of_few_rows(m)
  sizes = [(128, 5, 0, 2), (192, 4, 0, 2), (128, 4, 0, 3)]
  sizes += [(192, 4, 64, 2)] if product == "dw" else [(256, 4, 128, 2)]
  others = [
    Tiling(columns, stages, snake, fresh, warpgroups)
    for columns, stages, fresh, warpgroups in sizes
    for snake in snakes
  ]
  if product == "dw":
    return others
  pairs = [Tiling(128, 4, snake, warpgroups=3, cluster=2) for snake in snakes]
  return list(dict.fromkeys([*tilings.known(m), *pairs, *others]))


def _of_few_rows(m):
  """Those of the table, with copies of one step and fewer or more steps left out of a
  split, and whole contractions where it splits them."""
  replace, found = dataclasses.replace, tilings.known(m)
  for t in tilings.known(m):
    found.append(replace(t, fetched=1))
    found.append(replace(t, split=1, own_last=0))
    found += [replace(t, own_last=n) for n in (0, 4, 8) if t.split > 1]
  return list(dict.fromkeys(found))


def retune(product, m, n, k, flags):
  sets = sets_of(product, m, n, k, small=2)
  want = exact(product, sets[0])
  functions = {
    str(t).removeprefix("Tiling"): ours(product, t)
    for t in candidates(product, m, flags.snakes)
  }
  queues = jax_queues(functions, sets, want)
  few = m <= SMALL_ROWS
  times = medians(queues, len(sets), flags.seconds, flags.rounds, behind_work=few)
  print(f"retune {product} M={m} N={n} K={k}")
  for name, seconds in sorted(times.items(), key=lambda item: item[1])[: flags.show]:
    print(line(name, seconds, product, m, n, k), flush=True)


def main():
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--retune", action="store_true", help="sweep tilings instead")
  parser.add_argument("--rows", type=int, nargs="+", default=[4096, 8192, 64, 128])
  parser.add_argument("--products", nargs="+", default=PRODUCTS, choices=PRODUCTS)
  parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)))
  parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
  parser.add_argument("--seconds", type=float, default=0.05, help="of one turn")
  parser.add_argument("--snakes", type=int, nargs="+", default=(4, 8, 16))
  parser.add_argument("--no-check", dest="check", action="store_false", help="faster")
  parser.add_argument("--show", type=int, default=6, help="tilings printed by retune")
  flags = parser.parse_args()
  # PyTorch gets the rest. Memory asked for later would wait for the device.
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {flags.rounds} rounds")
  for product in flags.products:
    for m in flags.rows:
      if product == "dw" and m <= SMALL_ROWS:
        continue
      ratios = []
      for n, k in (SHAPES[i] for i in flags.shapes):
        if flags.retune:
          retune(product, m, n, k, flags)
        else:
          ratios.append(report(product, m, n, k, flags))
      if ratios and all(ratios):
        mean = statistics.geometric_mean(ratios)
        print(f"{product} M={m}: {mean:.3f} of cuBLASLt in geometric mean", flush=True)


if __name__ == "__main__":
  main()
