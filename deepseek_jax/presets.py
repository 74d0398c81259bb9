"""The papers' models, and `tiny`. Standard library only.

Sources: DeepSeek-V3 report (2412.19437) sections 2 and 4.2, DeepSeek-V2 (2405.04434)
section 3.1 and appendix B, DeepSeekMoE (2401.06066) sections 4 and 5, loss-free
balancing (2408.15664) section 4.1.
"""

import dataclasses

from deepseek_jax.config import ModelConfig

V3 = ModelConfig()
R1 = dataclasses.replace(V3, name="r1", max_seq_len=163840)
V2 = ModelConfig(
  name="v2",
  vocab_size=102400,
  dim=5120,
  inter_dim=12288,
  moe_inter_dim=1536,
  n_layers=60,
  n_dense_layers=1,
  n_routed_experts=160,
  n_shared_experts=2,
  n_activated_experts=6,
  n_limited_groups=3,
  score_func="softmax",
  group_score="max",
  norm_topk_prob=False,
  route_scale=16.0,
  use_router_bias=False,
  mscale=0.707,
  n_mtp_layers=0,
)
CODER_V2 = dataclasses.replace(V2, name="coder_v2", max_seq_len=163840)
V2_LITE = dataclasses.replace(
  V2,
  name="v2_lite",
  dim=2048,
  inter_dim=10944,
  moe_inter_dim=1408,
  n_layers=27,
  n_heads=16,
  q_lora_rank=0,
  n_routed_experts=64,
  n_expert_groups=1,
  n_limited_groups=1,
  route_scale=1.0,
)
CODER_V2_LITE = dataclasses.replace(V2_LITE, name="coder_v2_lite", max_seq_len=163840)
MOE_16B = dataclasses.replace(
  V2_LITE,
  name="moe_16b",
  n_layers=28,
  kv_lora_rank=0,
  qk_nope_head_dim=0,
  qk_rope_head_dim=128,
  rope_interleaved=False,
  rope_factor=1.0,
)
# The ablation models below state their expert width as a fraction of a standard
# feed-forward; we take the standard SwiGLU width, 8/3 of `dim`.
MOE_2B = dataclasses.replace(
  MOE_16B,
  name="moe_2b",
  vocab_size=8192,
  dim=1280,
  inter_dim=3413,
  moe_inter_dim=853,
  n_layers=9,
  n_dense_layers=0,
  n_heads=10,
  n_shared_experts=1,
  n_routed_experts=63,
  n_activated_experts=7,
  max_seq_len=2048,
)
LF_1B = dataclasses.replace(
  MOE_16B,
  name="lf_1b",
  vocab_size=32064,
  dim=1024,
  inter_dim=2731,
  moe_inter_dim=512,
  n_layers=10,
  n_heads=8,
  score_func="sigmoid",
  norm_topk_prob=True,
  use_router_bias=True,
  max_seq_len=2048,
)
LF_3B = dataclasses.replace(
  LF_1B,
  name="lf_3b",
  dim=1280,
  inter_dim=3413,
  moe_inter_dim=853,
  n_layers=12,
  n_heads=10,
)
# Every mechanism of V3 at a size for two CPU cores.
TINY = ModelConfig(
  name="tiny",
  vocab_size=4096,
  dim=128,
  inter_dim=384,
  moe_inter_dim=64,
  n_layers=4,
  n_dense_layers=1,
  n_heads=4,
  q_lora_rank=64,
  kv_lora_rank=32,
  qk_nope_head_dim=32,
  qk_rope_head_dim=16,
  v_head_dim=32,
  n_routed_experts=16,
  n_activated_experts=4,
  n_expert_groups=4,
  n_limited_groups=2,
  max_seq_len=256,
  init_std=0.02,
)

PRESETS = {
  preset.name: preset
  for preset in (
    V3,
    R1,
    V2,
    CODER_V2,
    V2_LITE,
    CODER_V2_LITE,
    MOE_16B,
    MOE_2B,
    LF_1B,
    LF_3B,
    TINY,
  )
}
