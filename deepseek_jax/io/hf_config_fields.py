"""What a config.json says, checked key by key, in our words.

`deepseek_fields` and `dense_fields` turn the keys of one family (see hf_config.py)
into the fields of ModelConfig and DenseConfig. A key that is missing, of the wrong
type, or says what our models cannot do is a ValueError of one line with the file, the
key and its value.
"""

import json
from typing import Any, Never

LATENT_NORM_EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm, whatever the file says
_MISSING = object()


class Keys:
  """The values of a config.json, checked as they are taken."""

  def __init__(self, where: str, values: dict[str, Any], inside: str = ""):
    self.where, self.values, self.inside = where, values, inside

  def refuse(self, key: str, why: str) -> Never:
    value = repr(self.values.get(key))
    shown = value if len(value) < 80 else value[:77] + "..."
    raise ValueError(
      f"{self.where}: {self.inside}{key}={shown} is not supported: {why}"
    )

  def get(self, key: str, kinds: tuple[type, ...], default: Any) -> Any:
    value = self.values.get(key, default)
    if value is _MISSING:
      raise ValueError(f"{self.where} has no key {self.inside}{key}")
    wrong = isinstance(value, bool) and bool not in kinds
    if value is not default and (wrong or not isinstance(value, kinds)):
      self.refuse(key, f"it must be {' or '.join(kind.__name__ for kind in kinds)}")
    return value

  def number(self, key: str, default: Any = _MISSING) -> float:
    value = self.get(key, (int, float), default)
    if not abs(value) < float("inf"):
      self.refuse(key, "it must be finite")
    return float(value)

  def whole(self, key: str, default: Any = _MISSING) -> int:
    value = self.get(key, (int,), default)
    if value < 0:
      self.refuse(key, "it must not be negative")
    return value

  def flag(self, key: str, default: Any = _MISSING) -> bool:
    return self.get(key, (bool,), default)

  def text(self, key: str, default: Any = _MISSING) -> str:
    return self.get(key, (str,), default)

  def expect(self, key: str, value: Any, default: Any = _MISSING) -> None:
    """Refuses any other value; None counts as the default."""
    found = self.values.get(key, default)
    if found is _MISSING:
      raise ValueError(f"{self.where} has no key {self.inside}{key}")
    if (default if found is None else found) != value:
      self.refuse(key, f"it must be {json.dumps(value)}")

  def below(self, key: str) -> "Keys | None":
    value = self.values.get(key)
    if value is None:
      return None
    if not isinstance(value, dict):
      self.refuse(key, "it must be an object")
    return Keys(self.where, value, f"{self.inside}{key}.")


def deepseek_fields(keys: Keys, family: str) -> dict[str, Any]:
  """Fields of ModelConfig."""
  latent = family in ("deepseek_v3", "deepseek_v2")
  sigmoid = family in ("deepseek_v3", "glm4_moe")
  heads = keys.whole("num_attention_heads")
  keys.expect("num_key_value_heads", heads, default=heads)
  keys.expect("attention_bias", False, default=False)
  keys.expect("tie_word_embeddings", False, default=False)
  keys.expect("moe_layer_freq", 1, default=1)
  score = "sigmoid" if sigmoid else "softmax"
  keys.expect("scoring_func", score, default=score)
  settings: dict[str, Any] = {
    "vocab_size": keys.whole("vocab_size"),
    "dim": keys.whole("hidden_size"),
    "inter_dim": keys.whole("intermediate_size"),
    "moe_inter_dim": keys.whole("moe_intermediate_size"),
    "n_layers": keys.whole("num_hidden_layers"),
    "n_dense_layers": keys.whole("first_k_dense_replace"),
    "n_heads": heads,
    "n_routed_experts": keys.whole("n_routed_experts"),
    "n_shared_experts": keys.whole("n_shared_experts"),
    "n_activated_experts": keys.whole("num_experts_per_tok"),
    "score_func": score,
    "group_score": "top2_sum" if sigmoid else "max",
    "norm_topk_prob": keys.flag("norm_topk_prob"),
    "route_scale": keys.number("routed_scaling_factor", 1.0),
    "use_router_bias": sigmoid,
    "max_seq_len": keys.whole("max_position_embeddings"),
    "rope_interleaved": latent,
    "n_mtp_layers": keys.whole("num_nextn_predict_layers", 0) if sigmoid else 0,
    "norm_eps": keys.number("rms_norm_eps"),
    "init_std": keys.number("initializer_range", 0.02),
  }
  if family == "glm4_moe":  # turns half of each head if neither place says how much
    place = keys.below("rope_parameters") or keys
    place.expect("partial_rotary_factor", 1)
  settings |= _groups(keys, family)
  settings |= _latent_heads(keys) if latent else _plain_heads(keys)
  if family == "deepseek_v3":
    settings["rope_interleaved"] = keys.flag("rope_interleave", True)
  if family == "deepseek_v2" and settings["norm_topk_prob"]:
    keys.refuse("norm_topk_prob", "V2's gates are not normalised")
  return settings | _yarn(keys, latent)


def _latent_heads(keys: Keys) -> dict[str, Any]:
  if keys.number("rms_norm_eps") != LATENT_NORM_EPS:
    keys.refuse("rms_norm_eps", "with latent attention it must be 1e-06")
  compressed = keys.values.get("q_lora_rank") is not None
  return {
    "q_lora_rank": keys.whole("q_lora_rank") if compressed else 0,
    "kv_lora_rank": keys.whole("kv_lora_rank"),
    "qk_nope_head_dim": keys.whole("qk_nope_head_dim"),
    "qk_rope_head_dim": keys.whole("qk_rope_head_dim"),
    "v_head_dim": keys.whole("v_head_dim"),
  }


def _plain_heads(keys: Keys) -> dict[str, Any]:
  keys.expect("use_qk_norm", False, default=False)
  width = _head_width(keys)
  latent = {"q_lora_rank": 0, "kv_lora_rank": 0, "qk_nope_head_dim": 0}
  return latent | {"qk_rope_head_dim": width, "v_head_dim": width}


def _head_width(keys: Keys) -> int:
  if keys.values.get("head_dim") is not None:
    return keys.whole("head_dim")
  return keys.whole("hidden_size") // max(keys.whole("num_attention_heads"), 1)


def _groups(keys: Keys, family: str) -> dict[str, int]:
  groups = keys.whole("n_group", 1) or 1
  kept = keys.whole("topk_group", 1) or 1
  methods = {"deepseek_v3": "noaux_tc", "glm4_moe": "noaux_tc", "deepseek": "greedy"}
  if family == "deepseek_v2":
    method = keys.text("topk_method")
    if method not in ("greedy", "group_limited_greedy"):
      keys.refuse("topk_method", "V2 has greedy and group_limited_greedy")
    if method == "greedy":  # over all experts, however they are grouped
      kept = groups
  else:
    keys.expect("topk_method", methods[family], default=methods[family])
  return {"n_expert_groups": groups, "n_limited_groups": kept}


def _rope(keys: Keys, known: tuple[str, ...]) -> tuple[str, float, Keys]:
  """Kind of scaling, theta, and the keys beside it."""
  rope = keys.below("rope_parameters") or keys.below("rope_scaling")
  rope = rope or Keys(keys.where, {}, "rope_scaling.")
  spelling = "rope_type" if "rope_type" in rope.values else "type"
  kind = rope.text(spelling, "default")
  if kind not in known:
    rope.refuse(spelling, f"known are {', '.join(known)}")
  for place in (rope, keys):
    place.expect("partial_rotary_factor", 1, default=1)
  home = rope if "rope_theta" in rope.values else keys
  return kind, home.number("rope_theta"), rope


def _yarn(keys: Keys, latent: bool) -> dict[str, Any]:
  kind, theta, rope = _rope(keys, ("default", "yarn") if latent else ("default",))
  settings: dict[str, Any] = {"rope_theta": theta, "yarn": "always"}
  if kind == "default":
    return settings | {"rope_factor": 1.0}
  rope.expect("attention_factor", None, default=None)
  rope.expect("truncate", True, default=True)
  mscale = rope.number("mscale")
  if not mscale or mscale != rope.number("mscale_all_dim"):
    rope.refuse("mscale", "it must equal mscale_all_dim and not be 0")
  return settings | {
    "rope_factor": rope.number("factor"),
    "beta_fast": rope.number("beta_fast", 32.0),
    "beta_slow": rope.number("beta_slow", 1.0),
    "mscale": mscale,
    "original_seq_len": rope.whole("original_max_position_embeddings"),
  }


def dense_fields(keys: Keys, family: str) -> dict[str, Any]:
  """Fields of DenseConfig."""
  keys.expect("use_sliding_window", False, default=False)
  if family == "llama":
    keys.expect("attention_bias", False, default=False)
  kinds = keys.get("layer_types", (list,), ["full_attention"])
  if any(kind != "full_attention" for kind in kinds):
    keys.refuse("layer_types", "all must be full_attention")
  kind, theta, rope = _rope(keys, ("default", "llama3"))
  heads = keys.whole("num_attention_heads")
  settings: dict[str, Any] = {
    "vocab_size": keys.whole("vocab_size"),
    "dim": keys.whole("hidden_size"),
    "inter_dim": keys.whole("intermediate_size"),
    "n_layers": keys.whole("num_hidden_layers"),
    "n_heads": heads,
    "n_kv_heads": keys.whole("num_key_value_heads", heads),
    "head_dim": _head_width(keys),
    "qkv_bias": family == "qwen2",
    "tie_embeddings": keys.flag("tie_word_embeddings", False),
    "max_seq_len": keys.whole("max_position_embeddings"),
    "rope_theta": theta,
    "norm_eps": keys.number("rms_norm_eps"),
    "init_std": keys.number("initializer_range", 0.02),
  }
  if kind == "llama3":
    settings |= {
      "rope_factor": rope.number("factor"),
      "low_freq_factor": rope.number("low_freq_factor"),
      "high_freq_factor": rope.number("high_freq_factor"),
      "original_seq_len": rope.whole("original_max_position_embeddings"),
    }
  return settings
