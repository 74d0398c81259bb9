"""Times one MoE layer of V3's shape on one GPU, forward and backward, BF16 and FP8.

    python -m experiments.benchmarks.moe_layer [--tokens 4096] [--experts 32] [--tiny]

Routing, permutation, the three matrix products, combine, and their gradients, those of
the weights in FP32 for FP8; no shared expert and no network, as in Megatron-Core's
proxy for V3's layer. Router and tokens are random, so that groups are uneven as in
training. FLOPs count the experts' products only: 18 x tokens x active x D x F. Weights
are cast or quantised before, as a step does once for all its micro-batches.

A time is the median over runs of `--calls` calls queued at once, divided by their
number: once with a pause before each run, and once without, after a second of calls
without any. At full load these GPUs reach the limit of their power and lower their
clocks, so that the second is slower. The FP8 result is compared with BF16's.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax import presets
from deepseek_jax.model.layers import (
  cast_for_compute,
  gradient_targets,
  quantize_for_compute,
  with_gradient_targets,
)
from deepseek_jax.model.moe import Execution, MoE
from deepseek_jax.precision.tiles import Recipe


def make_layer(flags):
  """The layer in FP32, tokens and an output gradient in BF16."""
  config = dataclasses.replace(
    presets.V3,
    n_routed_experts=flags.experts,
    n_shared_experts=0,
    n_expert_groups=1,
    n_limited_groups=1,
    init_std=0.02,
  )
  if flags.tiny:
    config = dataclasses.replace(config, dim=256, moe_inter_dim=128)
  keys = jax.random.split(jax.random.key(0), 3)
  layer = jax.jit(lambda: MoE(config, keys[0]))()
  shape = (1, flags.tokens, config.dim)
  x, dy = (jax.random.normal(k, shape, jnp.bfloat16) for k in keys[1:])
  return config, layer, x, dy


def backward(layer, x, dy):
  """The output, and the gradients of the input and of all weights."""

  def run(targets, x):
    return with_gradient_targets(layer, targets)(x, Execution())[0]

  y, pull = jax.vjp(run, gradient_targets(layer), x)
  return y, pull(dy)


def seconds(function, args, flags, pause: float = 0.0) -> float:
  """Median seconds of a call; `pause` seconds before each run of calls."""
  times = []
  for _ in range(flags.runs):
    time.sleep(pause)
    start = time.perf_counter()
    for _ in range(flags.calls):
      result = function(*args)
    jax.block_until_ready(result)
    times.append((time.perf_counter() - start) / flags.calls)
  return statistics.median(times)


def sustained_seconds(function, args, flags) -> float:
  """The same without pauses, after a second of calls."""
  until = time.perf_counter() + 1
  while time.perf_counter() < until:
    jax.block_until_ready(function(*args))
  return seconds(function, args, flags)


def calc_diff(x, y) -> float:
  x, y = (np.asarray(a, np.float32).astype(np.float64).ravel() for a in (x, y))
  return float(1 - 2 * (x @ y) / (x @ x + y @ y))


def main():
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--tokens", type=int, default=4096)
  parser.add_argument("--experts", type=int, default=32)
  parser.add_argument("--tiny", action="store_true", help="small, to try the command")
  parser.add_argument("--runs", type=int, default=10, help="runs behind a median")
  parser.add_argument("--calls", type=int, default=5, help="calls queued in a run")
  parser.add_argument("--pause", type=float, default=0.1, help="seconds before a run")
  parser.add_argument("--profile", help="folder for profiles of a few calls")
  flags = parser.parse_args()
  config, layer, x, dy = make_layer(flags)
  print(
    f"jax {jax.__version__}, {jax.devices()[0].device_kind}: {flags.tokens} tokens, "
    f"D={config.dim}, F={config.moe_inter_dim}, {flags.experts} experts, "
    f"top-{config.n_activated_experts}, {flags.runs} runs",
    flush=True,
  )
  bf16 = jax.jit(lambda m: cast_for_compute(m, jnp.bfloat16))(layer)
  fp8 = jax.jit(lambda m: quantize_for_compute(m, Recipe()))(bf16)
  flop = 18 * flags.tokens * config.n_activated_experts * config.dim
  flop *= config.moe_inter_dim
  run, outputs = jax.jit(backward), {}
  for name, weights in (("BF16", bf16), ("FP8", fp8)):
    args = weights, x, dy
    y, (_, dx) = jax.block_until_ready(run(*args))
    outputs[name] = y, dx
    if flags.profile:
      with jax.profiler.trace(f"{flags.profile}/{name}"):
        for _ in range(3):
          jax.block_until_ready(run(*args))
    times = {
      "after pauses": seconds(run, args, flags, flags.pause),
      "sustained": sustained_seconds(run, args, flags),
    }
    for title, time_s in times.items():
      rate = flop / time_s / 1e12
      line = f"  {name:5s} {title:13s} {time_s * 1e3:8.3f} ms  {rate:7.1f} TFLOP/s"
      print(line, flush=True)
  for name, a, b in zip(("y", "dx"), *outputs.values()):
    print(f"  calc_diff of {name}, FP8 against BF16: {calc_diff(a, b):.2e}", flush=True)


if __name__ == "__main__":
  main()
