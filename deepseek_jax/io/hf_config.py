"""Hugging Face's config.json, in and out.

Reads what DeepSeek published (`deepseek_v3`: V3, R1, V3.1; `deepseek_v2`: V2, V2-Lite,
Coder-V2; `deepseek`: DeepSeekMoE), the dense models that R1 was distilled into
(`qwen2`, `llama`), and `glm4_moe` without its options, which is DeepSeekMoE with V3's
router. Both spellings of the rotary settings are read (`rope_scaling`, and
`rope_parameters` of transformers 5). What a file says and our models cannot do is an
error, never ignored.

YaRN: transformers applies it always, DeepSeek's inference code only if `max_seq_len`
exceeds the original length. A released checkpoint ends with training under YaRN, so
reading gives `yarn="always"`: a run with a short `max_seq_len` stays the same model.

Settings of ours that these files have no word for (the name, YaRN while it is off, the
state that enters MTP) stand under a key of their own, `deepseek_jax`, which others pass
over; so `read_config(write_config(c)) == (c, None)`. Left out: sliding windows,
attention biases outside Qwen2, other scalings of positions, DeepSeek-V3.2's sparse
attention.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from deepseek_jax.config import ModelConfig
from deepseek_jax.dense_config import DenseConfig
from deepseek_jax.io.hf_config_fields import Keys, deepseek_fields, dense_fields

OURS = "deepseek_jax"  # our own key in config.json
ARCHITECTURES = {  # by model_type
  "deepseek_v3": "DeepseekV3ForCausalLM",
  "deepseek_v2": "DeepseekV2ForCausalLM",
  "deepseek": "DeepseekForCausalLM",
  "glm4_moe": "Glm4MoeForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "llama": "LlamaForCausalLM",
}


@dataclasses.dataclass(frozen=True)
class Quantization:
  """Weights stored as E4M3 with a scale for each 128 x 128 block.

  `scale_format`: "float32" scales (V3, R1) or powers of two, "ue8m0" (V3.1).
  """

  scale_format: Literal["float32", "ue8m0"] = "float32"

  def __post_init__(self):
    if self.scale_format not in ("float32", "ue8m0"):
      raise ValueError(f"scale_format={self.scale_format!r} must be float32 or ue8m0")


def read_config(
  source: str | Path | dict[str, Any], name: str | None = None
) -> tuple[ModelConfig | DenseConfig, Quantization | None]:
  """The model that a config.json describes, and how its weights are quantised.

  Args:
    source: a folder that has config.json, that file itself, or its content.
    name: of the model; by default the one it was written with, else the folder's.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not JSON, a key is missing or of the wrong type, or a model that we do
      not have; one line with the file and the key.
  """
  if isinstance(source, dict):
    keys, folder = Keys("config.json", source), ""
  else:
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    keys, folder = Keys(str(path), _load(path)), path.resolve().parent.name
  family = keys.text("model_type")
  if family not in ARCHITECTURES:
    keys.refuse("model_type", f"known are {', '.join(ARCHITECTURES)}")
  keys.expect("hidden_act", "silu", default="silu")
  keys.expect("attention_dropout", 0, default=0)
  keys.expect("mlp_bias", False, default=False)
  try:
    if family in ("qwen2", "llama"):
      config = DenseConfig(**dense_fields(keys, family), name=family)
    else:
      config = ModelConfig(**deepseek_fields(keys, family), name=family)
    config = _with_ours(config, keys, folder)
  except ValueError as error:
    text = str(error)
    raise ValueError(
      text if text.startswith(keys.where) else f"{keys.where}: {text}"
    ) from None
  if name:
    config = dataclasses.replace(config, name=name)
  return config, _quantization(keys)


def write_config(
  config: ModelConfig | DenseConfig,
  *,
  quantization: Quantization | None = None,
  dtype: str = "bfloat16",
  bos_token_id: int | None = None,
  eos_token_id: int | None = None,
) -> dict[str, Any]:
  """The content of config.json for `config`, for transformers and engines.

  Raises:
    ValueError: a setting that no family has; the field is named.
  """
  if isinstance(config, DenseConfig):
    content = _dense_content(config)
  else:
    content = _deepseek_content(config)
  content |= {
    "architectures": [ARCHITECTURES[content["model_type"]]],
    "attention_dropout": 0.0,
    "bos_token_id": bos_token_id,
    "eos_token_id": eos_token_id,
    "hidden_act": "silu",
    "hidden_size": config.dim,
    "initializer_range": config.init_std,
    "intermediate_size": config.inter_dim,
    "max_position_embeddings": config.max_seq_len,
    "num_attention_heads": config.n_heads,
    "num_hidden_layers": config.n_layers,
    "rms_norm_eps": config.norm_eps,
    "rope_theta": config.rope_theta,
    "torch_dtype": dtype,
    "use_cache": True,
    "vocab_size": config.vocab_size,
  }
  content[OURS] = _ours(config, content)
  if quantization:
    content["quantization_config"] = {
      "activation_scheme": "dynamic",
      "fmt": "e4m3",
      "quant_method": "fp8",
      "weight_block_size": [128, 128],
    }
    if quantization.scale_format == "ue8m0":
      content["quantization_config"]["scale_fmt"] = "ue8m0"
  return dict(sorted(content.items()))


def _deepseek_content(config: ModelConfig) -> dict[str, Any]:
  c, sigmoid = config, config.score_func == "sigmoid"
  limited = c.n_expert_groups > 1
  content: dict[str, Any] = {
    "attention_bias": False,
    "first_k_dense_replace": c.n_dense_layers,
    "moe_intermediate_size": c.moe_inter_dim,
    "moe_layer_freq": 1,
    "n_group": c.n_expert_groups,
    "n_routed_experts": c.n_routed_experts,
    "n_shared_experts": c.n_shared_experts,
    "norm_topk_prob": c.norm_topk_prob,
    "num_experts_per_tok": c.n_activated_experts,
    "num_key_value_heads": c.n_heads,
    "rope_scaling": None,
    "routed_scaling_factor": c.route_scale,
    "scoring_func": c.score_func,
    "tie_word_embeddings": False,
    "topk_group": c.n_limited_groups,
  }
  if sigmoid:
    content["topk_method"] = "noaux_tc"
    content["num_nextn_predict_layers"] = c.n_mtp_layers
  else:
    content["topk_method"] = "group_limited_greedy" if limited else "greedy"
  if not c.kv_lora_rank:
    content["model_type"] = "glm4_moe" if sigmoid else "deepseek"
    if sigmoid:
      content |= {"head_dim": c.qk_rope_head_dim, "use_qk_norm": False}
      content |= {"partial_rotary_factor": 1.0}
    return content
  content |= {
    "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
    "q_lora_rank": c.q_lora_rank or None,
    "kv_lora_rank": c.kv_lora_rank,
    "qk_nope_head_dim": c.qk_nope_head_dim,
    "qk_rope_head_dim": c.qk_rope_head_dim,
    "v_head_dim": c.v_head_dim,
  }
  if sigmoid:
    content["rope_interleave"] = c.rope_interleaved
  if c.use_yarn:
    content["rope_scaling"] = {
      "type": "yarn",
      "factor": c.rope_factor,
      "original_max_position_embeddings": c.original_seq_len,
      "beta_fast": c.beta_fast,
      "beta_slow": c.beta_slow,
      "mscale": c.mscale,
      "mscale_all_dim": c.mscale,
    }
  return content


def _dense_content(config: DenseConfig) -> dict[str, Any]:
  c = config
  content: dict[str, Any] = {
    "head_dim": c.head_dim,
    "model_type": "qwen2" if c.qkv_bias else "llama",
    "num_key_value_heads": c.n_kv_heads,
    "rope_scaling": None,
    "tie_word_embeddings": c.tie_embeddings,
  }
  if c.qkv_bias:
    content |= {"sliding_window": None, "use_sliding_window": False}
  else:
    content |= {"attention_bias": False, "mlp_bias": False}
  if c.rope_factor != 1:
    content["rope_scaling"] = {
      "rope_type": "llama3",
      "factor": c.rope_factor,
      "low_freq_factor": c.low_freq_factor,
      "high_freq_factor": c.high_freq_factor,
      "original_max_position_embeddings": c.original_seq_len,
    }
  return content


def _without_word(config: ModelConfig | DenseConfig) -> set[str]:
  """Fields that no key says, for a model like this one."""
  if isinstance(config, DenseConfig):
    unscaled = {"low_freq_factor", "high_freq_factor", "original_seq_len"}
    return {"name"} | (unscaled if config.rope_factor == 1 else set())
  fields = {"name", "yarn", "mtp_hidden"}
  if not config.use_yarn:
    fields |= {"rope_factor", "beta_fast", "beta_slow", "mscale", "original_seq_len"}
  if config.n_expert_groups == 1:
    fields |= {"group_score"}
  return fields


def _ours(config: ModelConfig | DenseConfig, content: dict[str, Any]) -> dict[str, Any]:
  """What the other keys leave out; refuses what they would change."""
  plain, _ = read_config(content)
  values = {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(config)
    if getattr(config, field.name) != getattr(plain, field.name)
  }
  for field in set(values) - _without_word(config):
    raise ValueError(
      f"model.{field}={values[field]!r} cannot be written for transformers: its "
      f"{content['model_type']} has {getattr(plain, field)!r}"
    )
  return values


def _with_ours(
  config: ModelConfig | DenseConfig, keys: Keys, folder: str
) -> ModelConfig | DenseConfig:
  """The config with the fields that stand under our own key."""
  ours = keys.below(OURS)
  if ours is None:
    return dataclasses.replace(config, name=folder) if folder else config
  for field in ours.values:
    if field not in _without_word(config):
      ours.refuse(field, "it contradicts the other keys, or is no setting")
    is_text = isinstance(getattr(config, field), str)
    ours.get(field, (str,) if is_text else (int, float), None)
  named = {"name": folder or config.name}
  merged = dataclasses.replace(config, **(named | ours.values))
  if getattr(merged, "use_yarn", False) != getattr(config, "use_yarn", False):
    ours.refuse("yarn", "with max_position_embeddings it contradicts rope_scaling")
  return merged


def _load(path: Path) -> dict[str, Any]:
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist: name a folder with a config.json")
  try:
    content = json.loads(path.read_text("utf-8"))
  except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
    raise ValueError(f"{path} is not JSON: {error}") from None
  if not isinstance(content, dict):
    raise ValueError(f"{path} is not a JSON object")
  return content


def _quantization(keys: Keys) -> Quantization | None:
  found = keys.below("quantization_config")
  if found is None:
    return None
  found.expect("quant_method", "fp8")
  found.expect("fmt", "e4m3", default="e4m3")
  found.expect("weight_block_size", [128, 128])
  scale_format = found.values.get("scale_fmt") or "float32"
  if scale_format not in ("float32", "ue8m0"):
    found.refuse("scale_fmt", "known are float32 and ue8m0")
  return Quantization(scale_format)
