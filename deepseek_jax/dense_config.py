"""Settings of dense decoders, and the six models that R1 was distilled into.

Standard library only. DeepSeek-R1 report (2501.12948), section 2.4: 800K samples of R1
fine-tune Qwen2.5-Math-1.5B and -7B, Qwen2.5-14B and -32B, Llama-3.1-8B and
Llama-3.3-70B-Instruct. Values are those of the released config.json files. Left out:
sliding windows, which none of the six uses.
"""

import dataclasses
from dataclasses import dataclass


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


@dataclass(frozen=True)
class DenseConfig:
  """Shape of a Qwen2 (`qkv_bias`) or Llama 3 (without) decoder.

  `rope_factor=1` means no scaling of positions; otherwise Llama 3.1's, in which pairs
  that turn more than `high_freq_factor` times within `original_seq_len` keep their
  frequency and those below `low_freq_factor` are slowed by `rope_factor`.
  """

  name: str = "r1_distill_qwen_7b"  # the defaults are this model's
  vocab_size: int = 152064
  dim: int = 3584
  inter_dim: int = 18944
  n_layers: int = 28
  n_heads: int = 28
  n_kv_heads: int = 4
  head_dim: int = 128
  qkv_bias: bool = True
  tie_embeddings: bool = False  # the head is the embedding

  max_seq_len: int = 131072  # longest sequence this run will see
  rope_theta: float = 10000.0
  rope_factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_seq_len: int = 8192

  norm_eps: float = 1e-6
  init_std: float = 0.02

  @property
  def cache_dim(self) -> int:
    """Values kept per token and layer while generating: keys and values."""
    return 2 * self.n_kv_heads * self.head_dim

  @property
  def n_routed_experts(self) -> int:
    return 0

  def __post_init__(self):
    for name in (
      "vocab_size",
      "dim",
      "inter_dim",
      "n_layers",
      "n_heads",
      "n_kv_heads",
      "head_dim",
      "max_seq_len",
      "original_seq_len",
    ):
      value = getattr(self, name)
      _require(value >= 1, f"model.{name}={value} must be >= 1")
    _require(
      self.n_heads % self.n_kv_heads == 0,
      f"model.n_kv_heads={self.n_kv_heads} must divide model.n_heads={self.n_heads}",
    )
    _require(
      self.head_dim % 2 == 0, f"model.head_dim={self.head_dim} must be even to rotate"
    )
    _require(
      self.rope_factor >= 1, f"model.rope_factor={self.rope_factor} must be >= 1"
    )
    _require(
      0 < self.low_freq_factor < self.high_freq_factor,
      f"model.low_freq_factor={self.low_freq_factor} must lie between 0 and "
      f"model.high_freq_factor={self.high_freq_factor}",
    )


DISTILL_QWEN_7B = DenseConfig()
DISTILL_QWEN_1_5B = dataclasses.replace(
  DISTILL_QWEN_7B,
  name="r1_distill_qwen_1_5b",
  vocab_size=151936,
  dim=1536,
  inter_dim=8960,
  n_heads=12,
  n_kv_heads=2,
)
DISTILL_QWEN_14B = dataclasses.replace(
  DISTILL_QWEN_7B,
  name="r1_distill_qwen_14b",
  dim=5120,
  inter_dim=13824,
  n_layers=48,
  n_heads=40,
  n_kv_heads=8,
  rope_theta=1e6,
  norm_eps=1e-5,
)
DISTILL_QWEN_32B = dataclasses.replace(
  DISTILL_QWEN_14B, name="r1_distill_qwen_32b", inter_dim=27648, n_layers=64
)
DISTILL_LLAMA_8B = DenseConfig(
  name="r1_distill_llama_8b",
  vocab_size=128256,
  dim=4096,
  inter_dim=14336,
  n_layers=32,
  n_heads=32,
  n_kv_heads=8,
  qkv_bias=False,
  rope_theta=500000.0,
  rope_factor=8.0,
  norm_eps=1e-5,
)
DISTILL_LLAMA_70B = dataclasses.replace(
  DISTILL_LLAMA_8B,
  name="r1_distill_llama_70b",
  dim=8192,
  inter_dim=28672,
  n_layers=80,
  n_heads=64,
)
# The same mechanisms at a size for two CPU cores; a student for distillation.
TINY_DENSE = DenseConfig(
  name="tiny_dense",
  vocab_size=4096,
  dim=128,
  inter_dim=384,
  n_layers=4,
  n_heads=4,
  n_kv_heads=2,
  head_dim=32,
  max_seq_len=256,
)

DENSE_PRESETS = {
  preset.name: preset
  for preset in (
    DISTILL_QWEN_1_5B,
    DISTILL_QWEN_7B,
    DISTILL_QWEN_14B,
    DISTILL_QWEN_32B,
    DISTILL_LLAMA_8B,
    DISTILL_LLAMA_70B,
    TINY_DENSE,
  )
}
