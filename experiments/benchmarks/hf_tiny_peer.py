"""The peer of hf_tiny.py: Hugging Face's DeepSeek-V3, in a process of its own.

Needs torch and transformers, nothing of ours. Reads one JSON object a line from
standard input and answers each with one: first the model's settings, answered with
versions and the implementation of experts that was fastest here; then {"steps": n},
answered with the seconds that n optimizer steps took.
"""

# pyright: reportMissingImports=false

import json
import sys
import time

import torch
import transformers

EXPERTS = ("eager", "grouped_mm", "batched_mm")


class Trainer:
  """Forward, backward, clipping and AdamW in FP32, as a user would write it."""

  def __init__(self, settings: dict, experts: str):
    self.settings = settings
    config = transformers.DeepseekV3Config(**settings["model"])
    self.model = transformers.AutoModelForCausalLM.from_config(
      config,
      dtype=torch.float32,
      attn_implementation="sdpa",
      experts_implementation=experts,
    ).train()
    self.optimizer = torch.optim.AdamW(
      self.model.parameters(),
      lr=settings["learning_rate"],
      betas=(0.9, 0.95),
      weight_decay=0.1,
      fused=True,
    )

  def run(self, steps: int) -> float:
    """Seconds of so many steps."""
    s = self.settings
    shape = (s["batch_size"], s["seq_len"] + 1)
    ids = torch.randint(0, s["model"]["vocab_size"], shape)
    start = time.perf_counter()
    for _ in range(steps):
      logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
      loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten()
      )
      loss.backward()
      torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
      self.optimizer.step()
      self.optimizer.zero_grad(set_to_none=True)
    loss.item()
    return time.perf_counter() - start


def fastest(settings: dict) -> tuple[Trainer, str, dict[str, float]]:
  """Tries each implementation of the experts; milliseconds a step of each."""
  trainers, milliseconds = {}, {}
  for experts in EXPERTS:
    try:
      trainers[experts] = Trainer(settings, experts)
      trainers[experts].run(2)
      times = [trainers[experts].run(1) for _ in range(settings["trials"])]
      milliseconds[experts] = 1e3 * min(times)
    except Exception as problem:
      print(f"{experts}: {problem}", file=sys.stderr)
  best = min(milliseconds, key=lambda name: milliseconds[name])
  return trainers[best], best, milliseconds


def main() -> None:
  settings = json.loads(sys.stdin.readline())
  torch.set_num_threads(settings["threads"])
  trainer, experts, milliseconds = fastest(settings)
  answer = {
    "versions": f"transformers {transformers.__version__}, torch {torch.__version__}",
    "experts": experts,
    "trials_ms": {name: round(ms) for name, ms in milliseconds.items()},
    "parameters": sum(p.numel() for p in trainer.model.parameters()),
  }
  print(json.dumps(answer), flush=True)
  for line in sys.stdin:
    seconds = trainer.run(json.loads(line)["steps"])
    print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
  main()
