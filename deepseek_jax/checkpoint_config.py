"""Settings of checkpoints: a run's own, and those of others. Standard library only."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CheckpointConfig:
  every: int = 500  # steps; 0: only at the end and on interruption
  keep: int = 3
  asynchronous: bool = True

  # import: the Hugging Face folder to read; export: the folder to write; pretrain: a
  # workdir (of an import, say) whose weights a new run starts from.
  path: str = ""
  # Of the weights, imported or exported; fp8 imports keep FP8 as it is. `imported`
  # exports the types and files of the checkpoint that was imported.
  dtype: Literal["bfloat16", "float32", "fp8", "fp8_ue8m0", "imported"] = "bfloat16"
  format: Literal["hf", "orbax", "maxtext"] = "hf"  # of an export
  average: bool = False  # export the moving average of the weights
  stacked: bool = True  # orbax: a parameter for all layers; False: one for each
  file_gb: float = 5.0  # hf: files are cut at this size

  def __post_init__(self):
    if self.keep < 1:
      raise ValueError(f"checkpoint.keep={self.keep} must be >= 1")
    choices = {
      "dtype": ("bfloat16", "float32", "fp8", "fp8_ue8m0", "imported"),
      "format": ("hf", "orbax", "maxtext"),
    }
    for name, allowed in choices.items():
      value = getattr(self, name)
      if value not in allowed:
        raise ValueError(
          f"checkpoint.{name}={value!r} must be one of {', '.join(allowed)}"
        )
    if self.file_gb <= 0:
      raise ValueError(f"checkpoint.file_gb={self.file_gb} must be > 0")
