"""What a finished run leaves to look at: plots, samples, and a last message."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.data.pipeline import Data
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.infer.generate import generate_text
from deepseek_jax.train.metrics import read_metrics
from deepseek_jax.train.plots import plot_expert_load, plot_losses
from deepseek_jax.train.step import TrainState, make_gather

_PROMPTS = ("def fibonacci(n):\n", "import os\nimport sys\n\n\ndef main(")
_HOLE = ("def add(a, b):\n    return ", "\n\n\nprint(add(1, 2))\n")


def finish(
  config: Config,
  workdir: Path,
  mesh: jax.sharding.Mesh,
  data: Data,
  state: TrainState,
  loads: list[np.ndarray],
) -> None:
  """Draws the plots, completes prompts, and says where everything is.

  Args:
    loads: expert counts of the last steps, [layers, experts] each; may be empty.
  """
  prompts = config.generate.prompts or sample_prompts(data.tokenizer)
  texts = _complete(config, mesh, data.tokenizer, state, list(prompts))
  if jax.process_index():
    return
  records = read_metrics(workdir)
  plot_losses(records, workdir / "plots" / "loss.png")
  if loads and loads[0].size:
    mean = np.mean(loads, axis=0)
    plot_expert_load(mean, workdir / "plots" / "expert_load.png")
  step = int(records[-1]["step"]) if records else 0
  samples = write_samples(prompts, texts, workdir / "samples" / f"step_{step}.txt")
  print(samples.read_text())
  print(_summary(records))
  for what, where in (
    ("checkpoint", "checkpoints"),
    ("metrics", "metrics.jsonl"),
    ("plots", "plots"),
    ("samples", "samples"),
  ):
    print(f"{what + ':':12}{workdir / where}")


def _complete(
  config: Config,
  mesh: jax.sharding.Mesh,
  tokenizer: Tokenizer,
  state: TrainState,
  prompts: list[str],
) -> list[str]:
  """As many tokens as are asked for, or as the model's longest sequence has room."""
  model = make_gather(config, mesh)(state.params, state.bias)
  longest = 1 + max(len(tokenizer.encode(prompt)) for prompt in prompts)
  room = max(1, config.model.max_seq_len - longest)
  settings = dataclasses.replace(
    config.generate, max_new_tokens=min(config.generate.max_new_tokens, room)
  )
  key = jax.random.key(config.seed)
  return generate_text(model, config, tokenizer, prompts, settings, mesh=mesh, key=key)


def sample_prompts(tokenizer: Tokenizer) -> tuple[str, ...]:
  """Beginnings of Python code, and a hole to fill if the tokenizer knows holes."""
  marks = (tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end)
  names = [tokenizer.decode([mark]) for mark in marks if mark is not None]
  if len(names) < len(marks):
    return _PROMPTS
  begin, hole, end = names
  return *_PROMPTS, f"{begin}{_HOLE[0]}{hole}{_HOLE[1]}{end}"


def write_samples(
  prompts: tuple[str, ...] | list[str], texts: list[str], path: Path
) -> Path:
  """Writes prompts and their completions to a text file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  parts = [
    f"--- prompt {i} ---\n{prompt}\n--- completion {i} ---\n{text}\n"
    for i, (prompt, text) in enumerate(zip(prompts, texts), 1)
  ]
  path.write_text("\n".join(parts), encoding="utf-8")
  return path


def _summary(records: list[dict[str, Any]]) -> str:
  if not records:
    return "no step was taken"
  first, last = records[0], records[-1]
  line = f"trained {last['step']} steps, {last['tokens']:,} tokens: loss "
  line += f"{first['loss']:.3f} to {last['loss']:.3f}"
  measured = [r for r in records if r.get("validation_loss") is not None]
  if measured:
    line += f", validation {measured[-1]['validation_loss']:.3f}"
    line += f" ({measured[-1]['bits_per_byte']:.3f} bits per byte)"
  return line
