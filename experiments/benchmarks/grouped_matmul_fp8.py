"""Times the grouped FP8 products on one GPU, beside the dense kernel of equal work.

    python -m experiments.benchmarks.grouped_matmul_fp8 [--shapes 0 1 2 3]

For each (groups, rows of each, N, K), forward and weight gradient:

  dense       kernels_pallas.fp8_matmul of as many rows and one matrix (for the weight
              gradient: of one group's size, times the number of groups)
  grouped     kernels_pallas.grouped_fp8_matmul, equal groups
  256 equal   as many rows in 256 groups
  256 uneven  the same in 256 groups of random sizes, some empty

Contenders take turns; a time is the median of rounds, of a queue of calls divided by
their number. Values are checked by tests/kernels_pallas/test_grouped_matmul_fp8.py.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.fp8_matmul import codes, jax_queues, medians
from kernels_pallas.fp8_matmul import fp8_matmul, fp8_matmul_dw
from kernels_pallas.grouped_matmul import grouped_fp8_matmul, grouped_fp8_matmul_dw

# Groups, rows of each, N, K: DeepGEMM's.
SHAPES = [
  (8, 4096, 4096, 7168),
  (8, 4096, 7168, 2048),
  (4, 8192, 4096, 7168),
  (4, 8192, 7168, 2048),
]
MANY = 256


def uneven(rows, groups=MANY):
  """Sizes that are multiples of 128 and sum to `rows`; some are 0."""
  rng = np.random.default_rng(0)
  shares = rng.dirichlet(np.full(groups, 0.5))
  return jnp.asarray(rng.multinomial(rows // 128, shares) * 128, jnp.int32)


def equal(rows, groups):
  return jnp.full((groups,), rows // groups, jnp.int32)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def matrices(key, groups, n, k):
  """Codes and scales of one matrix a group; drawn one by one, 256 in FP32 are 30 GB."""
  b = jax.lax.map(lambda key: codes(key, n, k)[0], jax.random.split(key, groups))
  return b, jax.random.uniform(key, (groups, -(-n // 128), k // 128), minval=0.5)


def forward(groups, rows, n, k):
  """The contenders, each with operands of its own."""
  keys = jax.random.split(jax.random.key(0), 3)
  a, sa = codes(keys[0], groups * rows, k)
  few, many = matrices(keys[1], groups, n, k), matrices(keys[2], MANY, n, k)
  total = groups * rows
  return {
    "dense": (fp8_matmul, (a, sa, few[0][0], few[1][0])),
    "grouped": (grouped_fp8_matmul, (a, sa, *few, equal(total, groups))),
    "256 equal": (grouped_fp8_matmul, (a, sa, *many, equal(total, MANY))),
    "256 uneven": (grouped_fp8_matmul, (a, sa, *many, uneven(total))),
  }


def weight_gradient(groups, rows, n, k):
  keys, total = jax.random.split(jax.random.key(0), 2), groups * rows
  (a, sa), (b, sb) = codes(keys[0], n, total), codes(keys[1], k, total)
  one = a[:, :rows], sa[: rows // 128], b[:, :rows], sb[: rows // 128]
  return {
    "dense": (fp8_matmul_dw, one),
    "grouped": (grouped_fp8_matmul_dw, (a, sa, b, sb, equal(total, groups))),
  }


def report(title, contenders, shape, flags):
  groups, rows, n, k = shape
  queues = {}
  for name, (function, operands) in contenders.items():
    queues |= jax_queues({name: function}, [operands])
  times = medians(queues, 1, flags.seconds, flags.rounds)
  if title == "dw" and "dense" in times:
    times["dense"] *= groups
  print(f"{title}: {groups} groups x {rows} rows, N={n}, K={k}")
  for name, seconds in times.items():
    rate = 2 * groups * rows * n * k / seconds / 1e12
    ratio = f"{times['dense'] / seconds:5.2f} of dense" if "dense" in times else ""
    print(
      f"  {name:12s} {seconds * 1e3:8.3f} ms {rate:7.1f} TFLOP/s {ratio}", flush=True
    )


def main():
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)))
  parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
  parser.add_argument("--seconds", type=float, default=0.05, help="of one turn")
  flags = parser.parse_args()
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {flags.rounds} rounds")
  for shape in (SHAPES[i] for i in flags.shapes):
    report("forward", forward(*shape), shape, flags)
    report("dw", weight_gradient(*shape), shape, flags)


if __name__ == "__main__":
  main()
