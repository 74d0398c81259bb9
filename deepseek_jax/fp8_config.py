"""How FP8 training rounds. The defaults are DeepSeek-V3's recipe (report, 3.3).

The other choices are the report's ablations; only `precision=fp8_emulated` computes
them, since what was found to be worse is not worth a fast path. Standard library only.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Fp8Config:
  # One scale for 128 values of an activation and 128x128 of a weight, or one a tensor.
  scales: Literal["tile", "tensor"] = "tile"
  # Gradients of activations: a scale for 1x128 values, or for a block (which diverged).
  gradient_tiles: Literal["1x128", "128x128"] = "1x128"
  gradient_format: Literal["e4m3", "e5m2"] = "e4m3"
  # Partial sums of 128 products are added in FP32; else all sums keep about 14 bits.
  promotion: bool = True
  # Scales are powers of two everywhere (V3.1), not only where values are kept (V3).
  power_of_two_scales: bool = False
  # What is kept of the attention output until its projection's weight gradient.
  attention_output: Literal["e5m6", "bf16"] = "e5m6"

  def __post_init__(self):
    choices = {
      "scales": ("tile", "tensor"),
      "gradient_tiles": ("1x128", "128x128"),
      "gradient_format": ("e4m3", "e5m2"),
      "attention_output": ("e5m6", "bf16"),
    }
    for name, allowed in choices.items():
      value = getattr(self, name)
      if value not in allowed:
        raise ValueError(f"fp8.{name}={value!r} must be one of {', '.join(allowed)}")

  @property
  def ablations(self) -> tuple[str, ...]:
    """Settings that no kernel computes, as the command line would say them."""
    default = Fp8Config()
    names = ("scales", "gradient_tiles", "gradient_format", "promotion")
    return tuple(
      f"fp8.{name}={getattr(self, name)}"
      for name in names
      if getattr(self, name) != getattr(default, name)
    )
