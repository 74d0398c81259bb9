"""Pre-training: `tiny` for two CPU cores, one for one H100, and the papers' recipes.

    python -m experiments.run --config=experiments/configs/pretrain.py:tiny \
      --workdir=runs/tiny --config.train.steps=100

The papers' variants state model, batch, learning rate and balancing as published
(DeepSeek-V3 report 4.2; V2 report 3.1 and appendix B; DeepSeekMoE sections 4 and 5;
loss-free balancing, section 4.1) and leave the mesh and the data to the command line.
"""

import dataclasses
import math

from ml_collections import ConfigDict

from deepseek_jax import presets
from deepseek_jax.config import (
  BalanceConfig,
  CheckpointConfig,
  Config,
  DataConfig,
  GenerateConfig,
  ModelConfig,
  ScheduleConfig,
  TrainConfig,
)
from experiments.overrides import to_config_dict

_CONSTANT = ((math.inf, "constant", 1.0),)


def _percent_schedule(warm_up: float) -> ScheduleConfig:
  """V3's schedule in percent of the run, with a warm-up and without a batch ramp."""
  return ScheduleConfig(
    total_tokens=100.0,
    fit_to_run=True,
    learning_rate=(
      (warm_up, "linear", 1.0),
      (60.0, "constant", 1.0),
      (97.0, "cosine", 0.1),
      (99.0, "constant", 0.1),
      (100.0, "constant", 7.3 / 220),
    ),
    bias_update_rate=((97.0, "constant", 1.0), (math.inf, "constant", 0.0)),
    mtp_weight=((68.0, "constant", 0.3), (math.inf, "constant", 0.1)),
    batch_size=_CONSTANT,
  )


def _step_schedule(
  tokens: float, warm_up_tokens: float, first: float, second: float
) -> ScheduleConfig:
  """DeepSeekMoE's and V2's: x 0.316 at a fraction `first` of the run and `second`."""
  return ScheduleConfig(
    total_tokens=tokens,
    learning_rate=(
      (warm_up_tokens, "linear", 1.0),
      (first * tokens, "constant", 1.0),
      (second * tokens, "constant", 0.316),
      (math.inf, "constant", 0.316**2),
    ),
    bias_update_rate=_CONSTANT,
    mtp_weight=_CONSTANT,
    batch_size=_CONSTANT,
  )


def _tiny() -> Config:
  return Config(
    precision="fp32",
    model=presets.TINY,
    train=TrainConfig(
      steps=200,
      batch_size=16,
      micro_batch_size=16,
      seq_len=128,
      learning_rate=3e-3,
      schedule=_percent_schedule(warm_up=5.0),
      bias_update_rate=1e-2,
      remat="none",
      eval_batches=4,
    ),
    data=DataConfig(max_bytes=8_000_000),
    checkpoint=CheckpointConfig(every=100, keep=2),
    generate=GenerateConfig(max_new_tokens=64),
  )


def _h100_100m() -> Config:
  """193M active parameters of 1.3B, for one H100 and minutes of training."""
  model = dataclasses.replace(
    presets.V3,
    name="h100_100m",
    vocab_size=16384,
    dim=1024,
    inter_dim=4096,
    moe_inter_dim=512,
    n_layers=12,
    n_dense_layers=1,
    n_heads=16,
    q_lora_rank=512,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
    n_routed_experts=64,
    n_shared_experts=1,
    n_activated_experts=6,
    n_expert_groups=1,
    n_limited_groups=1,
    max_seq_len=2048,
  )
  return Config(
    precision="bf16",
    model=model,
    train=TrainConfig(
      steps=800,
      batch_size=32,
      micro_batch_size=16,
      seq_len=2048,
      learning_rate=1e-3,
      schedule=_percent_schedule(warm_up=5.0),
      eval_every=200,
    ),
    data=DataConfig(tokenizer_vocab=16384),
    checkpoint=CheckpointConfig(every=500, keep=1),
  )


def _v3() -> Config:
  # 469B tokens of a rising batch are about 12.4K steps, the rest 227.8K.
  return Config(
    model=presets.V3,
    train=TrainConfig(steps=240_200),
    data=DataConfig(tokenizer_vocab=128_000),
  )


def _v2() -> Config:
  schedule = dataclasses.replace(
    _step_schedule(8.1e12, 2000 * 2304 * 4096, 0.6, 0.9),
    batch_size=((0, "constant", 0.25), (225e9, "linear", 1.0)),
  )
  return _without_bias(
    presets.V2,
    BalanceConfig(sequence=0.0, expert=0.003, device=0.05, communication=0.02),
    steps=218_200,
    batch_size=9216,
    seq_len=4096,
    learning_rate=2.4e-4,
    schedule=schedule,
  )


def _v2_lite() -> Config:
  return _without_bias(
    presets.V2_LITE,
    BalanceConfig(sequence=0.0, expert=0.001),
    steps=301_996,
    batch_size=4608,
    seq_len=4096,
    learning_rate=4.2e-4,
    schedule=_step_schedule(5.7e12, 2000 * 4608 * 4096, 0.8, 0.9),
  )


def _moe_16b() -> Config:
  return _without_bias(
    presets.MOE_16B,
    BalanceConfig(sequence=0.0, expert=0.001),
    steps=106_449,
    batch_size=4608,
    seq_len=4096,
    learning_rate=4.2e-4,
    schedule=_step_schedule(2e12, 2000 * 4608 * 4096, 0.8, 0.9),
  )


def _moe_2b() -> Config:
  return _without_bias(
    presets.MOE_2B,
    BalanceConfig(sequence=0.0, expert=0.01),
    steps=25_000,
    batch_size=2048,
    seq_len=2048,
    learning_rate=1.08e-3,
    schedule=_step_schedule(100e9, 2000 * 2048 * 2048, 0.8, 0.9),
    tokenizer_vocab=8192,
  )


def _lf_1b() -> Config:
  tokens = 40_000 * 1152 * 2048
  schedule = dataclasses.replace(
    _step_schedule(tokens, 0, 0.8, 0.9),
    learning_rate=((1000 * 1152 * 2048, "linear", 1.0), (tokens, "cosine", 0.1)),
  )
  return _loss_free(presets.LF_1B, 40_000, 1152, 1e-3, schedule)


def _lf_3b() -> Config:
  batch = 1728 * 2048
  schedule = dataclasses.replace(
    _step_schedule(56_514 * batch, 0, 0.8, 0.9),
    learning_rate=(
      (2000 * batch, "linear", 1.0),
      (45_211 * batch, "constant", 1.0),
      (50_862 * batch, "constant", 2.47 / 7.8),
      (math.inf, "constant", 0.1),
    ),
  )
  return _loss_free(presets.LF_3B, 56_514, 1728, 7.8e-4, schedule)


def _without_bias(
  model: ModelConfig,
  balance: BalanceConfig,
  tokenizer_vocab: int = 100_000,
  **train,
) -> Config:
  return Config(
    model=model,
    train=TrainConfig(balance=balance, bias_update_rate=0.0, **train),
    data=DataConfig(tokenizer_vocab=tokenizer_vocab, fim_rate=0.0),
  )


def _loss_free(
  model: ModelConfig,
  steps: int,
  batch_size: int,
  learning_rate: float,
  schedule: ScheduleConfig,
) -> Config:
  return Config(
    model=model,
    train=TrainConfig(
      steps=steps,
      batch_size=batch_size,
      seq_len=2048,
      learning_rate=learning_rate,
      schedule=schedule,
      bias_update_rate=1e-3,
      balance=BalanceConfig(sequence=0.0),
    ),
    data=DataConfig(tokenizer_vocab=32_000, fim_rate=0.0),
  )


VARIANTS = {
  "tiny": _tiny,
  "h100_100m": _h100_100m,
  "v3": _v3,
  "v2": _v2,
  "v2_lite": _v2_lite,
  "moe_16b": _moe_16b,
  "moe_2b": _moe_2b,
  "lf_1b": _lf_1b,
  "lf_3b": _lf_3b,
}


def get_config(variant: str = "tiny") -> ConfigDict:
  """The settings of one variant.

  Raises:
    ValueError: an unknown variant.
  """
  if variant not in VARIANTS:
    raise ValueError(
      f"pretrain.py has no variant {variant!r}: use one of {', '.join(VARIANTS)}"
    )
  return to_config_dict(VARIANTS[variant]())
