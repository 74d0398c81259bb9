"""Tokens/s and MFU of the training step of a pretrain config, on random tokens.

    python -m experiments.benchmarks.train_step --variant h100_100m \
      [--micro_batch 16] [--micro_batches 4] [--remat deepseek] [--steps 10]

Prints compile time, memory, the median over steps and the FLOP convention behind MFU
(deepseek_jax/train/metrics.py). `--trace FOLDER` writes a profile of one step.
"""

import argparse
import dataclasses
import math
import statistics
import time

import jax
import numpy as np

from deepseek_jax.config import MeshConfig
from deepseek_jax.mesh import make_mesh
from deepseek_jax.train import metrics, step
from experiments.configs import pretrain
from experiments.overrides import to_config


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description="Times one training step.")
  parser.add_argument("--variant", default="h100_100m")
  parser.add_argument("--micro_batch", type=int)
  parser.add_argument("--micro_batches", type=int, default=1)
  parser.add_argument("--remat", choices=("deepseek", "none", "full"))
  parser.add_argument("--no_mtp", action="store_true")
  parser.add_argument("--expert", type=int, default=1, help="size of the expert axis")
  parser.add_argument("--capacity", type=float, default=math.inf)
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument("--trace")
  return parser.parse_args()


def configure(args: argparse.Namespace):
  config = to_config(pretrain.get_config(args.variant))
  micro = args.micro_batch or config.train.micro_batch_size
  train = dataclasses.replace(
    config.train,
    micro_batch_size=micro,
    batch_size=micro * args.expert * args.micro_batches,
    remat=args.remat or config.train.remat,
  )
  model = config.model
  if args.no_mtp:
    model = dataclasses.replace(model, n_mtp_layers=0)
  mesh = MeshConfig(expert=args.expert)
  return dataclasses.replace(config, model=model, train=train, mesh=mesh)


def main():
  args = parse()
  config = configure(args)
  t = config.train
  mesh = make_mesh(expert=args.expert, devices=jax.devices()[: args.expert])
  state = step.init_state(config, mesh)
  rows = t.micro_batch_size * args.expert
  shape = (args.micro_batches, rows, t.seq_len + 1)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
  batch = {"tokens": jax.device_put(tokens, step.batch_sharding(mesh))}
  scalars = step.Scalars(np.float32(1e-4), np.float32(1e-3), np.float32(0.3))
  start = time.perf_counter()
  train_step = step.make_train_step(config, mesh, args.capacity)
  train_step = train_step.lower(state, batch, scalars).compile()
  print(f"device {jax.devices()[0].device_kind}, jax {jax.__version__}")
  print(f"trace and compile {time.perf_counter() - start:.1f} s")
  print(train_step.memory_analysis())

  def timed(state):
    start = time.perf_counter()
    state, out = train_step(state, batch, scalars)
    jax.block_until_ready(out)
    return state, out, time.perf_counter() - start

  for _ in range(3):
    state, out, _ = timed(state)
  seconds = []
  for _ in range(args.steps):
    state, out, elapsed = timed(state)
    seconds.append(elapsed)
  if args.trace:
    with jax.profiler.trace(args.trace):
      state, out, _ = timed(state)
  median = statistics.median(seconds)
  n = batch["tokens"].shape[0] * rows * t.seq_len
  flops = metrics.flops_per_token(config.model, t.seq_len)
  rate = n / median
  print(f"loss {float(out['loss']):.4f}, applied {bool(out['applied'])}")
  print(
    f"{config.model.name}: {n} tokens a step, median {1e3 * median:.1f} ms "
    f"({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f}), {rate:,.0f} tokens/s, "
    f"{flops / 1e9:.3f} GFLOP/token, {rate * flops / 1e12 / args.expert:.1f} TFLOP/s "
    "a device"
  )


if __name__ == "__main__":
  main()
