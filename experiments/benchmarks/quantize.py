"""Times tile quantisation on one GPU, beside a plain copy and XLA's own fusion.

    python -m experiments.benchmarks.quantize [--check] [--only NAME]

These operations do little arithmetic, so what counts is memory: bytes read plus bytes
written, over time, as a share of what a copy of as many bytes reaches in the same run.
For each operation and shape:

  ours   kernels_pallas.quantize, impl='gpu'
  XLA    the same function, impl='reference', compiled by XLA
  copy   half the bytes read and half written by XLA's copy, or by its negation of BF16,
         whichever is faster

A time is the median over runs; a run queues `--calls` programs, each of which takes
four different inputs one after the other, so that caches hold nothing of use, while the
device is busy with something else (ahead.py): the host's launches do not count.
`--check` compares codes, scales and sums with the reference's first.
"""

import argparse
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.benchmarks.ahead import MOST, seconds_behind_work
from kernels_pallas import quantize as qz

INPUTS = 4  # different inputs in one program
E4M3 = jnp.float8_e4m3fn


def both_with_powers(x, impl):
  return qz.quantize_both(x, power_of_two=True, impl=impl)


def swiglu_rows(h, gate, impl):
  return qz.swiglu_quantize(h, gate, impl=impl)


def swiglu_and_kept(h, gate, impl):
  return qz.swiglu_quantize(h, gate, with_h=True, impl=impl)


def swiglu_both(h, gate, impl):
  return qz.swiglu_quantize(h, gate, both=True, impl=impl)


def swiglu_backward(h, gate, dy, impl):
  return qz.swiglu_quantize_backward(h, gate, dy, with_y=True, impl=impl)


def matrix(key, *shape):
  return (jax.random.normal(key, shape, jnp.bfloat16),)


def kept(key, *shape):
  x = jax.random.normal(key, shape, jnp.bfloat16)
  return qz.quantize_rows(x, power_of_two=True)


def gated(key, Z, F):
  keys = jax.random.split(key, 2)
  h = jax.random.normal(keys[0], (Z, 2 * F), jnp.bfloat16)
  return h, jax.random.uniform(keys[1], (Z,), jnp.float32)


def gated_with_gradient(key, Z, F):
  keys = jax.random.split(key, 2)
  return *gated(keys[0], Z, F), jax.random.normal(keys[1], (Z, F), jnp.bfloat16)


def kept_with_gradient(key, Z, F):
  h, gate, dy = gated_with_gradient(key, Z, F)
  return qz.quantize_rows(h, power_of_two=True), gate, dy


# Name: function, maker of inputs, shapes. The first are M x K of V3's linears, blocks
# are a dense weight and 8 experts, SwiGLU an expert's rows and the dense layers' width.
CASES = {
  "rows": (qz.quantize_rows, matrix, [(4096, 7168), (8192, 7168), (8192, 16384)]),
  "columns": (qz.quantize_columns, matrix, [(4096, 7168), (8192, 7168)]),
  "both": (qz.quantize_both, matrix, [(4096, 7168), (8192, 7168), (8192, 16384)]),
  "both, 2^n": (both_with_powers, matrix, [(8192, 7168)]),
  "columns of codes": (qz.requantize_columns, kept, [(8192, 7168), (32768, 7168)]),
  "blocks": (
    qz.quantize_blocks,
    matrix,
    [(4096, 7168), (7168, 18432), (8, 7168, 4096)],
  ),
  "swiglu rows": (swiglu_rows, gated, [(32768, 2048), (4096, 18432)]),
  "swiglu, h kept": (swiglu_and_kept, gated, [(32768, 2048), (4096, 18432)]),
  "swiglu both": (swiglu_both, gated, [(32768, 2048), (4096, 18432)]),
  "swiglu backward": (
    swiglu_backward,
    gated_with_gradient,
    [(32768, 2048), (4096, 18432)],
  ),
  "swiglu backward of codes": (
    swiglu_backward,
    kept_with_gradient,
    [(32768, 2048), (4096, 18432)],
  ),
}


def one_after_another(function):
  """A program of several calls; each waits for the one before."""

  def program(inputs):
    results = []
    for args in inputs:
      if results:
        args, results[-1] = lax.optimization_barrier((args, results[-1]))
      results.append(function(*args))
    return results

  return jax.jit(program)


def seconds(function, inputs, flags) -> float:
  """Median seconds of one call."""
  program = one_after_another(function)
  jax.block_until_ready(program(inputs))

  def queue():
    for _ in range(flags.calls):  # what an earlier program made is freed
      result = program(inputs)
    return result

  times = [seconds_behind_work(queue) for _ in range(flags.runs)]
  return statistics.median(times) / flags.calls / len(inputs)


@functools.cache
def _copy_seconds(bytes_moved: int, calls: int, runs: int) -> float:
  flags = argparse.Namespace(calls=calls, runs=runs)
  elements = bytes_moved // 4  # BF16, read once and written once
  keys = jax.random.split(jax.random.key(1), INPUTS)
  inputs = [matrix(key, elements) for key in keys]
  return min(seconds(f, inputs, flags) for f in (jnp.copy, jnp.negative))


def size_of(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def differences(got, want) -> str:
  """Share of unequal elements in the worst output, NaNs being equal."""
  worst = 0.0
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    g, w = (np.asarray(a, np.float32) for a in (g, w))
    worst = max(worst, float(np.mean((g != w) & ~(np.isnan(g) & np.isnan(w)))))
  return f"{worst:.1e} differ"


def report(name, function, make, shape, flags):
  inputs = [make(key, *shape) for key in jax.random.split(jax.random.key(0), INPUTS)]
  ours = functools.partial(function, impl="gpu")
  theirs = functools.partial(function, impl="reference")
  moved = size_of(inputs[0]) + size_of(jax.eval_shape(theirs, *inputs[0]))
  checked = ""
  if flags.check:
    checked = differences(jax.jit(ours)(*inputs[0]), jax.jit(theirs)(*inputs[0]))
  copy_s = _copy_seconds(moved, flags.calls, flags.runs)
  ours_s = seconds(ours, inputs, flags)
  line = (
    f"{name:24s} {'x'.join(map(str, shape)):12s} {moved / 1e6:7.0f} MB "
    f"ours {ours_s * 1e3:7.3f} ms {moved / ours_s / 1e9:6.0f} GB/s "
    f"{copy_s / ours_s:5.2f} of copy ({moved / copy_s / 1e9:.0f}) "
  )
  if flags.xla:
    xla_s = seconds(theirs, inputs, flags)
    line += f"XLA {xla_s * 1e3:7.3f} ms {copy_s / xla_s:5.2f} of copy "
  print(line + checked, flush=True)


def main():
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--check", action="store_true", help="compare values first")
  parser.add_argument("--only", help="operations whose name has this in it")
  parser.add_argument("--no-xla", dest="xla", action="store_false", help="faster")
  parser.add_argument("--first", action="store_true", help="only each first shape")
  parser.add_argument("--runs", type=int, default=15, help="runs behind a median")
  parser.add_argument("--calls", type=int, default=8, help="programs queued in a run")
  flags = parser.parse_args()
  if not 0 < flags.calls <= MOST:
    parser.error(f"--calls={flags.calls}: give 1 to {MOST}, more would wait")
  device = jax.devices()[0]
  print(f"jax {jax.__version__}, {device.device_kind}, {flags.runs} runs", flush=True)
  for name, (function, make, shapes) in CASES.items():
    if flags.only is None or flags.only in name:
      for shape in shapes[:1] if flags.first else shapes:
        report(name, function, make, shape, flags)


if __name__ == "__main__":
  main()
