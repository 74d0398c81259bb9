"""Training speed of `tiny` beside Hugging Face's DeepSeek-V3 of the same config.

    python -m experiments.benchmarks.hf_tiny --peer_python PATH

PATH is a Python with torch and transformers; it may be this one. Both sides take whole
optimizer steps in FP32 on the same cores: forward, backward, clipping, AdamW. The
peer runs in a process of its own and both are warm; they are measured in turns, a
round each, so that whatever else the machine does meets both. Three lines:

  peer        Hugging Face's model: no MTP, no router bias update, FP32 moments; the
              fastest of its implementations of experts, fused AdamW, SDPA
  same model  ours without MTP, FP32 moments; bias update and balance loss included
  tiny        ours as `make demo` trains it, with MTP: one more layer and head

Then the time it takes to trace and compile tiny's step, without a cache.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.mesh import make_mesh
from deepseek_jax.train import step as training
from experiments.configs import pretrain
from experiments.overrides import to_config


class Ours:
  """Our step on one device, compiled, with its own state."""

  def __init__(self, config: Config):
    self.config, mesh = config, make_mesh(devices=jax.devices()[:1])
    self.state = training.init_state(config, mesh)
    t = config.train
    step = training.make_train_step(config, mesh, t.capacities[0])
    self.scalars = training.Scalars(
      np.float32(t.learning_rate),
      np.float32(t.bias_update_rate),
      np.float32(0.3),
      np.False_,
    )
    self.batch = self._random_batch(mesh)
    start = time.perf_counter()
    lowered = step.lower(self.state, self.batch, self.scalars)
    traced = time.perf_counter()
    self.step = lowered.compile()
    self.trace_s = traced - start
    self.compile_s = time.perf_counter() - traced

  def _random_batch(self, mesh):
    t, vocab = self.config.train, self.config.model.vocab_size
    shape = (1, t.batch_size, t.seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, vocab, shape, np.int32)
    return {"tokens": jax.device_put(tokens, training.batch_sharding(mesh))}

  def run(self, steps: int) -> float:
    """Seconds of so many steps."""
    start = time.perf_counter()
    for _ in range(steps):
      self.state, metrics = self.step(self.state, self.batch, self.scalars)
    if not bool(metrics["applied"]):
      raise RuntimeError("a step was not applied")
    return time.perf_counter() - start


class Peer:
  """hf_tiny_peer.py in its own process; closed with the `with` statement."""

  def __init__(self, python: str, settings: dict):
    self.process = subprocess.Popen(
      [python, str(Path(__file__).with_name("hf_tiny_peer.py"))],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    assert self.process.stdin
    assert self.process.stdout
    self.questions, self.answers = self.process.stdin, self.process.stdout
    self.about = self._ask(settings)

  def _ask(self, question: dict) -> dict:
    self.questions.write(json.dumps(question) + "\n")
    self.questions.flush()
    answer = self.answers.readline()
    if not answer:
      raise RuntimeError(f"the peer ended with exit code {self.process.wait()}")
    return json.loads(answer)

  def run(self, steps: int) -> float:
    return self._ask({"steps": steps})["seconds"]

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.questions.close()
    self.process.wait()


def hf_settings(config: Config, threads: int) -> dict:
  """The peer's model and batch: ours in Hugging Face's words, without MTP."""
  c, t = config.model, config.train
  model = {
    "vocab_size": c.vocab_size,
    "hidden_size": c.dim,
    "intermediate_size": c.inter_dim,
    "moe_intermediate_size": c.moe_inter_dim,
    "num_hidden_layers": c.n_layers,
    "first_k_dense_replace": c.n_dense_layers,
    "num_attention_heads": c.n_heads,
    "num_key_value_heads": c.n_heads,
    "q_lora_rank": c.q_lora_rank,
    "kv_lora_rank": c.kv_lora_rank,
    "qk_nope_head_dim": c.qk_nope_head_dim,
    "qk_rope_head_dim": c.qk_rope_head_dim,
    "v_head_dim": c.v_head_dim,
    "n_routed_experts": c.n_routed_experts,
    "n_shared_experts": c.n_shared_experts,
    "num_experts_per_tok": c.n_activated_experts,
    "n_group": c.n_expert_groups,
    "topk_group": c.n_limited_groups,
    "routed_scaling_factor": c.route_scale,
    "max_position_embeddings": c.max_seq_len,
    "initializer_range": c.init_std,
    "num_nextn_predict_layers": 0,
  }
  return {
    "model": model,
    "batch_size": t.batch_size,
    "seq_len": t.seq_len,
    "learning_rate": t.learning_rate,
    "threads": threads,
    "trials": 5,
  }


def measure(runners: dict, rounds: int, seconds: float, pause: float) -> dict:
  """Seconds a step of each runner, one figure a round, taken in turns."""
  steps, times = {}, {name: [] for name in runners}
  for name, run in runners.items():
    run(3)
    steps[name] = max(1, round(seconds / (run(3) / 3)))
  for _ in range(rounds):
    for name, run in runners.items():
      time.sleep(pause)  # until the other's threads have stopped spinning
      times[name].append(run(steps[name]) / steps[name])
  return times


def report(times: dict, tokens: int) -> None:
  print("\n| | tokens/s, median | slowest to fastest | ms a step | against the peer |")
  print("|---|---|---|---|---|")
  for name, each in times.items():
    speeds = sorted(tokens / s for s in each)
    ratios = [peer / own for peer, own in zip(times["peer"], each)]
    print(
      f"| {name} | {statistics.median(speeds):,.0f} "
      f"| {speeds[0]:,.0f} to {speeds[-1]:,.0f} "
      f"| {1e3 * statistics.median(each):.0f} | {statistics.median(ratios):.2f} x |"
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--peer_python", required=True, help="has torch, transformers")
  parser.add_argument("--rounds", type=int, default=7, help="behind a median")
  parser.add_argument("--seconds", type=float, default=3.0, help="of a phase")
  parser.add_argument("--pause", type=float, default=0.5, help="between phases")
  parser.add_argument("--batch_size", type=int, help="default: that of tiny")
  parser.add_argument("--seq_len", type=int, help="default: that of tiny")
  flags = parser.parse_args()
  config = to_config(pretrain.get_config("tiny"))
  batch_size = flags.batch_size or config.train.batch_size
  train = dataclasses.replace(
    config.train,
    batch_size=batch_size,
    micro_batch_size=batch_size,
    seq_len=flags.seq_len or config.train.seq_len,
  )
  tiny = dataclasses.replace(config, train=train)
  same = dataclasses.replace(
    tiny,
    model=dataclasses.replace(tiny.model, n_mtp_layers=0),
    train=dataclasses.replace(train, moment_dtype="float32"),
  )
  cores = len(os.sched_getaffinity(0))
  jax.config.update("jax_enable_compilation_cache", False)

  ours, ours_tiny = Ours(same), Ours(tiny)
  with Peer(flags.peer_python, hf_settings(tiny, cores)) as peer:
    about = peer.about
    runners = {"peer": peer.run, "same model": ours.run, "tiny": ours_tiny.run}
    times = measure(runners, flags.rounds, flags.seconds, flags.pause)
  parameters = sum(x.size for x in ours.state.params.values())
  print(
    f"{datetime.date.today()}, {platform.processor() or platform.machine()}", end=""
  )
  print(f", {cores} cores, {flags.rounds} rounds of {flags.seconds} s")
  print(f"jax {jax.__version__}; {about['versions']}, experts={about['experts']}")
  print(
    f"peer's milliseconds a step by implementation of experts: {about['trials_ms']}"
  )
  print(f"parameters: {parameters:,} and {about['parameters']:,}")
  print(f"batch {train.batch_size} x {train.seq_len} tokens, FP32")
  report(times, train.batch_size * train.seq_len)
  print(f"\ntiny's step: {ours_tiny.trace_s:.1f} s to trace and lower,", end=" ")
  print(f"{ours_tiny.compile_s:.1f} s to compile")


if __name__ == "__main__":
  sys.exit(main())
