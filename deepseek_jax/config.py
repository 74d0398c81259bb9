"""Every setting, once, as frozen dataclasses; presets.py has the papers' models.

Standard library only, so that planners and command lines can read configs without
JAX. Field names are those of DeepSeek's own configs (`inference/model.py`) where
they exist there. Errors are `ValueError`s that name the field, its value and the
mend; they are raised when a dataclass is built.

Defaults: DeepSeek-V3 report (2412.19437), sections 2 and 4.2.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from deepseek_jax.checkpoint_config import CheckpointConfig
from deepseek_jax.fp8_config import Fp8Config
from deepseek_jax.rebalance_config import RebalanceConfig

# A schedule is a tuple of pieces `(until_tokens, shape, value)`: up to and including
# `until_tokens` the value moves from the previous piece's value (0 before the first)
# to `value` as "linear" or "cosine", or stands at `value` ("constant").
Piece = tuple[float, str, float]
Pieces = tuple[Piece, ...]


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


def _positive(config: Any, section: str, names: str) -> None:
  for name in names.split():
    value = getattr(config, name)
    _require(value >= 1, f"{section}.{name}={value} must be >= 1")


@dataclass(frozen=True)
class ModelConfig:
  """Shape and conventions of one model.

  `q_lora_rank=0` means no query compression (V2-Lite). `kv_lora_rank=0` means plain
  multi-head attention with heads of `qk_rope_head_dim`, all of it rotated
  (DeepSeekMoE's models). `rope_factor=1` means no YaRN.
  """

  name: str = "v3"  # the defaults are V3's
  vocab_size: int = 129280
  dim: int = 7168
  inter_dim: int = 18432  # width of the dense feed-forward layers
  moe_inter_dim: int = 2048  # width of one expert
  n_layers: int = 61  # without MTP modules
  n_dense_layers: int = 3  # leading layers with a dense feed-forward
  n_heads: int = 128

  q_lora_rank: int = 1536
  kv_lora_rank: int = 512
  qk_nope_head_dim: int = 128
  qk_rope_head_dim: int = 64
  v_head_dim: int = 128

  n_routed_experts: int = 256
  n_shared_experts: int = 1
  n_activated_experts: int = 8
  n_expert_groups: int = 8
  n_limited_groups: int = 4
  score_func: Literal["sigmoid", "softmax"] = "sigmoid"
  group_score: Literal["top2_sum", "max"] = "top2_sum"
  norm_topk_prob: bool = True
  norm_topk_epsilon: float = 1e-20
  route_scale: float = 2.5
  use_router_bias: bool = True  # auxiliary-loss-free balancing

  max_seq_len: int = 4096  # longest sequence this run will see
  original_seq_len: int = 4096  # length before context extension
  rope_theta: float = 10000.0
  rope_interleaved: bool = True  # pairs (2i, 2i+1); else (i, i + width/2)
  rope_factor: float = 40.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0
  # DeepSeek's code applies YaRN only if max_seq_len > original_seq_len; HF always.
  yarn: Literal["beyond_original", "always"] = "beyond_original"

  n_mtp_layers: int = 1
  # The main model's state that enters MTP: after or before the final norm.
  mtp_hidden: Literal["post_norm", "pre_norm"] = "post_norm"
  # Released weights concatenate [embedding; hidden], the paper's formula the reverse.
  mtp_concat: Literal["embedding_first", "hidden_first"] = "embedding_first"

  norm_eps: float = 1e-6
  init_std: float = 0.006

  @property
  def use_yarn(self) -> bool:
    if self.rope_factor == 1:
      return False
    return self.yarn == "always" or self.max_seq_len > self.original_seq_len

  @property
  def n_moe_layers(self) -> int:
    return self.n_layers - self.n_dense_layers

  @property
  def qk_head_dim(self) -> int:
    return self.qk_nope_head_dim + self.qk_rope_head_dim

  @property
  def cache_dim(self) -> int:
    """Values kept per token and layer while generating."""
    if self.kv_lora_rank:
      return self.kv_lora_rank + self.qk_rope_head_dim
    return self.n_heads * (self.qk_head_dim + self.v_head_dim)

  def __post_init__(self):
    choices = {
      "score_func": ("sigmoid", "softmax"),
      "group_score": ("top2_sum", "max"),
      "yarn": ("beyond_original", "always"),
      "mtp_hidden": ("post_norm", "pre_norm"),
      "mtp_concat": ("embedding_first", "hidden_first"),
    }
    for name, allowed in choices.items():
      value = getattr(self, name)
      _require(
        value in allowed, f"model.{name}={value!r} must be one of {', '.join(allowed)}"
      )
    for name in [
      "vocab_size",
      "dim",
      "inter_dim",
      "n_layers",
      "n_heads",
      "qk_rope_head_dim",
      "v_head_dim",
    ]:
      _require(
        getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be >= 1"
      )
    _require(
      0 <= self.n_dense_layers <= self.n_layers,
      f"model.n_dense_layers={self.n_dense_layers} must lie between 0 and "
      f"model.n_layers={self.n_layers}",
    )
    _require(
      self.qk_rope_head_dim % 2 == 0,
      f"model.qk_rope_head_dim={self.qk_rope_head_dim} must be even",
    )
    if self.n_moe_layers or self.n_mtp_layers:
      self._check_experts()
    if not self.kv_lora_rank:
      _require(
        not self.q_lora_rank and not self.qk_nope_head_dim,
        "model.kv_lora_rank=0 (plain multi-head attention) needs q_lora_rank=0 and "
        "qk_nope_head_dim=0",
      )

  def _check_experts(self):
    experts, groups = self.n_routed_experts, self.n_expert_groups
    _require(
      groups >= 1 and experts % groups == 0,
      f"model.n_expert_groups={groups} must divide model.n_routed_experts={experts}",
    )
    _require(
      1 <= self.n_limited_groups <= groups,
      f"model.n_limited_groups={self.n_limited_groups} must lie between 1 and "
      f"model.n_expert_groups={groups}",
    )
    _require(
      1 <= self.n_activated_experts <= experts // groups * self.n_limited_groups,
      f"model.n_activated_experts={self.n_activated_experts} must lie between 1 and "
      f"{experts // groups * self.n_limited_groups}, the experts of "
      f"{self.n_limited_groups} groups",
    )
    _require(
      self.group_score == "max" or groups == 1 or experts // groups >= 2,
      "model.group_score=top2_sum needs at least two experts in a group",
    )


@dataclass(frozen=True)
class MeshConfig:
  pipeline: int = 1
  data: int = 1
  expert: int = 1
  # Networks that the routed experts are spread over, each of `expert` devices: tokens
  # cross to another one once, then go to their devices there.
  node: int = 1

  def __post_init__(self):
    _positive(self, "mesh", "pipeline data expert node")


@dataclass(frozen=True)
class BalanceConfig:
  """Weights of the losses that balance experts; 0 leaves one out.

  V3 uses `sequence` (its equation 17); V2 used the three others (section 2.2).
  """

  sequence: float = 1e-4
  expert: float = 0.0
  device: float = 0.0
  communication: float = 0.0


@dataclass(frozen=True)
class ScheduleConfig:
  """What changes during a run, as multiples of the peak values in `TrainConfig`.

  All positions are in tokens of the recipe. With `fit_to_run` the recipe's
  `total_tokens` are stretched over the run's own tokens; otherwise a token of the
  run is a token of the recipe. Defaults: DeepSeek-V3 report, section 4.2 (2,000
  warm-up steps at the first batch size of 3,072 x 4,096 are 25.2B tokens).
  """

  total_tokens: float = 14.8e12
  fit_to_run: bool = False
  learning_rate: Pieces = (
    (25.2e9, "linear", 1.0),
    (10e12, "constant", 1.0),
    (14.3e12, "cosine", 0.1),
    (14.633e12, "constant", 0.1),
    (14.8e12, "constant", 7.3 / 220),
  )
  bias_update_rate: Pieces = (
    (14.3e12, "constant", 1.0),
    (math.inf, "constant", 0.0),
  )
  mtp_weight: Pieces = ((10e12, "constant", 0.3), (math.inf, "constant", 0.1))
  batch_size: Pieces = ((0, "constant", 0.2), (469e9, "linear", 1.0))

  def __post_init__(self):
    for name in ("learning_rate", "bias_update_rate", "mtp_weight", "batch_size"):
      pieces = getattr(self, name)
      _require(len(pieces) > 0, f"train.schedule.{name} must have at least one piece")
      untils = [piece[0] for piece in pieces]
      _require(
        untils == sorted(untils),
        f"train.schedule.{name} must be ordered by tokens, got {untils}",
      )
      for _, shape, _ in pieces:
        _require(
          shape in ("linear", "cosine", "constant"),
          f"train.schedule.{name} has shape {shape!r}: use linear, cosine or constant",
        )


@dataclass(frozen=True)
class TrainConfig:
  steps: int = 1000  # optimizer steps
  batch_size: int = 15360  # sequences of the global batch, after the ramp
  micro_batch_size: int = 1  # sequences of a device in one micro-batch
  seq_len: int = 4096
  learning_rate: float = 2.2e-4  # peak
  schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
  beta1: float = 0.9
  beta2: float = 0.95
  adam_eps: float = 1e-8
  weight_decay: float = 0.1
  decay_norms: bool = False  # unpublished; norm gains are not decayed by default
  moment_dtype: Literal["bfloat16", "float32"] = "bfloat16"
  clip_norm: float = 1.0
  bias_update_rate: float = 1e-3  # gamma; 0 freezes the router bias
  balance: BalanceConfig = field(default_factory=BalanceConfig)
  remat: Literal["deepseek", "none", "full"] = "deepseek"
  # Bounds of dispatch, as multiples of the balanced load; the last means no bound.
  capacities: tuple[float, ...] = (1.25, 1.5, 2.0, 3.0, 4.0, 8.0, math.inf)
  max_bad_steps: int = 10  # stop after so many non-finite steps in a row
  ema_decay: float = 0.0  # 0 keeps no moving average of the weights
  ema_every: int = 1
  log_every: int = 1
  eval_every: int = 0  # 0 evaluates at the end only
  eval_batches: int = 8

  def __post_init__(self):
    _positive(self, "train", "steps batch_size micro_batch_size seq_len log_every")
    _require(
      self.moment_dtype in ("bfloat16", "float32"),
      f"train.moment_dtype={self.moment_dtype!r} must be bfloat16 or float32",
    )
    _require(
      self.remat in ("deepseek", "none", "full"),
      f"train.remat={self.remat!r} must be deepseek, none or full",
    )
    _require(
      len(self.capacities) > 0
      and list(self.capacities) == sorted(self.capacities)
      and math.isinf(self.capacities[-1]),
      f"train.capacities={self.capacities} must rise and end in inf, so that no token "
      "is ever dropped",
    )
    _require(
      0 <= self.ema_decay < 1, f"train.ema_decay={self.ema_decay} must be in [0, 1)"
    )


@dataclass(frozen=True)
class DataConfig:
  """`path` empty: the sources of the running interpreter's standard library."""

  path: str = (
    ""  # file, folder or glob: text, .jsonl[.gz|.zst], .parquet, .array_record
  )
  text_key: str = "text"  # field of a JSONL object, column of a Parquet file
  tokenizer: str = ""  # a HF tokenizer.json; empty: train one on the data
  tokenizer_vocab: int = 4096  # vocabulary of a tokenizer trained here
  max_bytes: int = 0  # read at most so much text (0: all)
  validation_fraction: float = 0.02  # of documents
  fim_rate: float = 0.1  # documents turned into prefix-suffix-middle order
  mask_documents: bool = False  # True: no attention across documents in a sequence
  shuffle: bool = True
  workers: int = 2  # prefetching threads

  def __post_init__(self):
    _require(
      0 <= self.fim_rate <= 1, f"data.fim_rate={self.fim_rate} must be in [0, 1]"
    )
    _require(
      0 <= self.validation_fraction < 1,
      f"data.validation_fraction={self.validation_fraction} must be in [0, 1)",
    )


@dataclass(frozen=True)
class GenerateConfig:
  prompts: tuple[str, ...] = ()
  max_new_tokens: int = 128
  temperature: float = 0.0  # 0: greedy
  top_p: float = 1.0
  stop: tuple[str, ...] = ()  # texts whose single token ends a completion, besides EOS
  checkpoint: str = ""  # a training workdir, for job=generate
  placement: str = ""  # a file of job=rebalance: experts are held where it says
  fp8: bool = False  # the weights of Linears in FP8, as training in FP8 multiplies
  # Prompts as questions in the workdir's chat template; `thinking` opens <think> too.
  chat: Literal["off", "template", "thinking"] = "off"

  def __post_init__(self):
    _positive(self, "generate", "max_new_tokens")
    _require(
      self.chat in ("off", "template", "thinking"),
      f"generate.chat={self.chat!r} must be off, template or thinking",
    )
    _require(
      self.temperature >= 0, f"generate.temperature={self.temperature} must be >= 0"
    )
    _require(0 < self.top_p <= 1, f"generate.top_p={self.top_p} must be in (0, 1]")


@dataclass(frozen=True)
class Config:
  """One run: what `experiments.run` builds from an ml_collections config."""

  job: str = "pretrain"
  seed: int = 0
  # fp8_emulated: the arithmetic of fp8 in plain JAX, with the ablations of `fp8`.
  precision: Literal["bf16", "fp8", "fp8_emulated", "fp32"] = "bf16"
  fp8: Fp8Config = field(default_factory=Fp8Config)
  model: ModelConfig = field(default_factory=ModelConfig)  # jobs: or a DenseConfig
  mesh: MeshConfig = field(default_factory=MeshConfig)
  train: TrainConfig = field(default_factory=TrainConfig)
  data: DataConfig = field(default_factory=DataConfig)
  checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
  generate: GenerateConfig = field(default_factory=GenerateConfig)
  rebalance: RebalanceConfig = field(default_factory=RebalanceConfig)

  def __post_init__(self):
    _require(
      self.precision in ("bf16", "fp8", "fp8_emulated", "fp32"),
      f"precision={self.precision!r} must be bf16, fp8, fp8_emulated or fp32",
    )
    _require(
      self.precision == "fp8_emulated" or not self.fp8.ablations,
      f"precision={self.precision} does not compute {', '.join(self.fp8.ablations)}: "
      "use precision=fp8_emulated",
    )
    _require(
      self.train.seq_len <= self.model.max_seq_len,
      f"train.seq_len={self.train.seq_len} exceeds model.max_seq_len="
      f"{self.model.max_seq_len}: raise the latter",
    )
    _require(
      self.model.n_routed_experts % (self.mesh.node * self.mesh.expert) == 0,
      f"mesh.node={self.mesh.node} x mesh.expert={self.mesh.expert} must divide "
      f"model.n_routed_experts={self.model.n_routed_experts}",
    )
    _require(
      self.mesh.pipeline == 1,
      f"mesh.pipeline={self.mesh.pipeline}: only 1 is supported so far",
    )
    ranks = self.mesh.data * self.mesh.node * self.mesh.expert
    micro = self.train.micro_batch_size * ranks
    _require(
      self.train.batch_size % micro == 0,
      f"train.batch_size={self.train.batch_size} must be a multiple of {micro} = "
      f"train.micro_batch_size={self.train.micro_batch_size} x mesh.data="
      f"{self.mesh.data} x mesh.node={self.mesh.node} x mesh.expert="
      f"{self.mesh.expert}",
    )
