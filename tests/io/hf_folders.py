"""Folders like those that Hugging Face has, small and random, for tests."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from deepseek_jax import presets
from deepseek_jax.dense_config import TINY_DENSE
from deepseek_jax.io import safetensors_write as writing
from deepseek_jax.io.hf_config import Quantization, write_config
from deepseek_jax.io.hf_names import HF_SCALE, hf_places
from deepseek_jax.io.safetensors import DTYPES
from deepseek_jax.io.safetensors_write import Spec

# Ragged on purpose: no width below is a multiple of 128, and 144 + 16 has two blocks.
V3 = dataclasses.replace(
  presets.TINY,
  name="small_v3",
  vocab_size=96,
  dim=160,
  inter_dim=200,
  moe_inter_dim=24,
  n_layers=3,
  n_heads=4,
  q_lora_rank=136,
  kv_lora_rank=144,
  qk_nope_head_dim=12,
  v_head_dim=10,
  n_routed_experts=8,
  n_activated_experts=2,
  n_expert_groups=4,
  n_limited_groups=2,
  yarn="always",
)
V2 = dataclasses.replace(
  V3,
  name="small_v2",
  n_shared_experts=2,
  score_func="softmax",
  group_score="max",
  norm_topk_prob=False,
  route_scale=16.0,
  use_router_bias=False,
  mscale=0.707,
  n_mtp_layers=0,
)
V2_LITE = dataclasses.replace(
  V2,
  name="small_v2_lite",
  q_lora_rank=0,
  n_expert_groups=1,
  n_limited_groups=1,
  route_scale=1.0,
)
MOE = dataclasses.replace(
  V2_LITE,
  name="small_moe",
  kv_lora_rank=0,
  qk_nope_head_dim=0,
  qk_rope_head_dim=40,
  v_head_dim=40,
  rope_interleaved=False,
  rope_factor=1.0,
  mscale=1.0,
)
QWEN = dataclasses.replace(TINY_DENSE, name="small_qwen", vocab_size=96, dim=32)
TIED = dataclasses.replace(QWEN, name="small_tied", tie_embeddings=True)
LLAMA = dataclasses.replace(QWEN, name="small_llama", qkv_bias=False)
MODELS = {config.name: config for config in (V3, V2, V2_LITE, MOE, QWEN, TIED, LLAMA)}


def random_tensors(
  config, kind: str = "BF16", seed: int = 0, power_of_two: bool = False
) -> dict[str, np.ndarray]:
  """A checkpoint's tensors; `kind` "F8_E4M3" gives codes and scales as V3 has them."""
  random = np.random.default_rng(seed)
  tensors: dict[str, np.ndarray] = {}
  originals: dict[str, np.ndarray] = {}
  places = hf_places(config)
  for name, place in sorted(places.items(), key=lambda item: item[1].copy):
    if place.copy:
      tensors[name] = originals[place.path]
      continue
    values = random.standard_normal(place.shape, np.float32)
    values *= 0.1 if len(place.shape) > 1 else 1.0
    if kind == "F8_E4M3" and place.fp8:
      tensors[name] = np.clip(values * 1000, -448, 448).astype(DTYPES[kind])
      scale = random.uniform(1e-4, 2e-4, place.scale.shape).astype(np.float32)
      if power_of_two:
        scale = np.exp2(np.ceil(np.log2(scale))).astype(np.float32)
      tensors[name + HF_SCALE] = scale
    else:
      plain = "BF16" if kind == "F8_E4M3" else kind
      tensors[name] = values.astype(DTYPES["F32" if place.wide else plain])
    originals[place.path] = tensors[name]
  return tensors


def write_folder(
  folder: Path,
  config,
  tensors: dict[str, np.ndarray],
  max_bytes: float = 1e9,
  quantization: Quantization | None = None,
) -> Path:
  """A folder of these tensors, whatever they are, with the config's config.json."""
  folder.mkdir(parents=True)
  names = {dtype: name for name, dtype in DTYPES.items()}
  specs = [Spec(n, names[t.dtype], t.shape) for n, t in sorted(tensors.items())]
  files = writing.cut_into_files(specs, max_bytes)
  for name, group in files.items():
    header, ordered = writing.make_header(group, writing.METADATA)
    writing.write_file(folder / name, header, ordered, lambda s: tensors[s.name])
  if len(files) > 1:
    writing.write_index(folder, files)
  content = write_config(config, quantization=quantization)
  (folder / "config.json").write_text(json.dumps(content, indent=2))
  return folder
