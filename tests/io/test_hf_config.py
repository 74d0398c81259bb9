"""config.json in and out: every published family, every preset, and what is refused.

`tests/fixtures/hf_configs.json` holds the values of published files; architecture keys
only, without the lists of Python files that some carry.
"""

import dataclasses
import json

import jax
import pytest

from deepseek_jax.config import ModelConfig
from deepseek_jax.dense_config import (
  DENSE_PRESETS,
  DISTILL_LLAMA_8B,
  DISTILL_LLAMA_70B,
  DISTILL_QWEN_1_5B,
  DISTILL_QWEN_7B,
  DISTILL_QWEN_14B,
  DISTILL_QWEN_32B,
  TINY_DENSE,
  DenseConfig,
)
from deepseek_jax.io.hf_config import OURS, Quantization, read_config, write_config
from deepseek_jax.model.dense import DenseTransformer
from deepseek_jax.model.layers import named_variables
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.presets import MOE_16B, PRESETS, R1, TINY, V2, V2_LITE, V3
from tests.fixtures import weights

PUBLISHED = json.loads((weights.FOLDER / "hf_configs.json").read_text("utf-8"))
LONG = {"max_seq_len": 163840, "yarn": "always", "init_std": 0.02}
EXPECTED = {
  "DeepSeek-V3": dataclasses.replace(V3, **LONG),
  "DeepSeek-R1": dataclasses.replace(R1, **LONG),
  "DeepSeek-V3.1": dataclasses.replace(V3, **LONG),
  "DeepSeek-V2": dataclasses.replace(V2, **LONG),
  "DeepSeek-V2.5": dataclasses.replace(V2, **LONG, mscale=1.0),
  "DeepSeek-V2-Lite": dataclasses.replace(V2_LITE, **LONG),
  "deepseek-moe-16b-base": dataclasses.replace(
    MOE_16B, init_std=0.02, yarn="always", mscale=1.0
  ),
  "DeepSeek-R1-Distill-Qwen-1.5B": DISTILL_QWEN_1_5B,
  "DeepSeek-R1-Distill-Qwen-7B": DISTILL_QWEN_7B,
  "DeepSeek-R1-Distill-Qwen-14B": DISTILL_QWEN_14B,
  "DeepSeek-R1-Distill-Qwen-32B": DISTILL_QWEN_32B,
  "DeepSeek-R1-Distill-Llama-8B": DISTILL_LLAMA_8B,
  "DeepSeek-R1-Distill-Llama-70B": DISTILL_LLAMA_70B,
}
PARAMETERS = {  # with MTP, whose embedding and head are the main model's
  "DeepSeek-V3": 671_026_419_200 + 11_610_068_224,
  "deepseek-moe-16b-base": 16_375_728_128,
  "DeepSeek-V2-Lite": 15_706_484_224,
  "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
  "DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
  "DeepSeek-R1-Distill-Qwen-14B": 14_770_033_664,
  "DeepSeek-R1-Distill-Qwen-32B": 32_763_876_352,
  "DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
  "DeepSeek-R1-Distill-Llama-70B": 70_553_706_496,
}


def changed(model: str, **keys) -> dict:
  return json.loads(json.dumps(PUBLISHED[model])) | keys


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_files_are_the_presets(model):
  config, quantization = read_config(PUBLISHED[model], name=EXPECTED[model].name)
  assert config == EXPECTED[model]
  formats = {"DeepSeek-V3": "float32", "DeepSeek-R1": "float32"}
  formats |= {"DeepSeek-V3.1": "ue8m0"}
  found = quantization and quantization.scale_format
  assert found == formats.get(model)


@pytest.mark.parametrize("model", PARAMETERS)
def test_parameter_counts(model):
  config, _ = read_config(PUBLISHED[model])
  kind = DenseTransformer if isinstance(config, DenseConfig) else Transformer
  blank = jax.eval_shape(lambda: kind(config, jax.random.key(0)))
  total = sum(v.size for v in named_variables(blank).values())
  assert total == PARAMETERS[model]


ALL = PRESETS | DENSE_PRESETS


@pytest.mark.parametrize("name", ALL)
def test_every_preset_survives(name):
  written = json.loads(json.dumps(write_config(ALL[name])))
  assert read_config(written) == (ALL[name], None)


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_files_survive(model):
  """What we write says the same as what was published, key by key."""
  config, quantization = read_config(PUBLISHED[model])
  written = write_config(config, quantization=quantization)
  assert read_config(written) == (config, quantization)
  same = set(written) & set(PUBLISHED[model])
  assert {"architectures", "model_type", "hidden_size", "rope_theta"} <= same
  theirs = PUBLISHED[model]
  for key in same - {"bos_token_id", "eos_token_id", "sliding_window"}:
    assert written[key] == theirs[key], key
  if "sliding_window" in written:  # theirs is out of use
    assert not theirs["use_sliding_window"]


def test_variants_survive():
  """Settings of ours that transformers has no word for, and those it has."""
  for config in (
    dataclasses.replace(TINY, mtp_hidden="pre_norm", n_mtp_layers=2),
    dataclasses.replace(R1, rope_interleaved=False),
    dataclasses.replace(TINY_DENSE, tie_embeddings=True, rope_factor=4.0),
    dataclasses.replace(TINY_DENSE, qkv_bias=False, original_seq_len=5),
  ):
    assert read_config(write_config(config))[0] == config


def test_both_spellings_of_rotary_settings():
  """transformers 5 moves `rope_theta` and the scaling into `rope_parameters`."""
  for model in ("DeepSeek-V3", "DeepSeek-R1-Distill-Llama-8B", "DeepSeek-V2-Lite"):
    old = changed(model)
    rope = old.pop("rope_scaling")
    rope["rope_type"] = rope.pop("type", "llama3")
    new = old | {"rope_parameters": rope | {"rope_theta": old.pop("rope_theta")}}
    assert "rope_theta" not in new
    assert read_config(new) == read_config(PUBLISHED[model])


def test_of_a_folder(tmp_path):
  """Its name is the model's, unless the file or the caller has another."""
  folder = tmp_path / "DeepSeek-V3"
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(PUBLISHED["DeepSeek-V3"]))
  config, quantization = read_config(folder)
  assert config.name == "DeepSeek-V3"
  assert quantization == Quantization("float32")
  assert read_config(folder / "config.json", name="mine")[0].name == "mine"
  (folder / "config.json").write_text(json.dumps(write_config(TINY)))
  assert read_config(str(folder))[0] == TINY


def test_yarn_of_an_imported_model_does_not_depend_on_the_length():
  config, _ = read_config(PUBLISHED["DeepSeek-V3"])
  assert isinstance(config, ModelConfig)
  assert dataclasses.replace(config, max_seq_len=2048).use_yarn


YARN = PUBLISHED["DeepSeek-V3"]["rope_scaling"]
REFUSED = {
  "another activation": ("DeepSeek-V3", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
  "attention bias": ("DeepSeek-V3", {"attention_bias": True}, "attention_bias=True"),
  "bias of Llama": (
    "DeepSeek-R1-Distill-Llama-8B",
    {"attention_bias": True},
    "attention_bias=True",
  ),
  "some layers without experts": (
    "DeepSeek-V3",
    {"moe_layer_freq": 2},
    "moe_layer_freq=2",
  ),
  "scaling of positions": (
    "DeepSeek-V3",
    {"rope_scaling": {"type": "linear", "factor": 2}},
    "rope_scaling.type='linear'",
  ),
  "mscales apart": (
    "DeepSeek-V3",
    {"rope_scaling": YARN | {"mscale_all_dim": 0.5}},
    "rope_scaling.mscale=1.0",
  ),
  "scaled sines": (
    "DeepSeek-V3",
    {"rope_scaling": YARN | {"attention_factor": 1.2}},
    "rope_scaling.attention_factor=1.2",
  ),
  "scores": ("DeepSeek-V3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
  "method": ("DeepSeek-V3", {"topk_method": "greedy"}, "topk_method='greedy'"),
  "normalised V2": ("DeepSeek-V2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
  "fewer keys": ("DeepSeek-V3", {"num_key_value_heads": 8}, "num_key_value_heads=8"),
  "norm of latents": ("DeepSeek-V3", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
  "tied": ("DeepSeek-V3", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
  "sliding": (
    "DeepSeek-R1-Distill-Qwen-7B",
    {"use_sliding_window": True},
    "use_sliding_window=True",
  ),
  "other blocks": (
    "DeepSeek-V3",
    {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
    "quantization_config.weight_block_size=[64, 64]",
  ),
  "other quantisation": (
    "DeepSeek-V3",
    {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "quantization_config.quant_method='awq'",
  ),
  "unknown family": (
    "DeepSeek-V3",
    {"model_type": "deepseek_v32"},
    "model_type='deepseek_v32'",
  ),
  "text for a number": ("DeepSeek-V3", {"hidden_size": "7168"}, "hidden_size='7168'"),
  "truth for a number": ("DeepSeek-V3", {"hidden_size": True}, "hidden_size=True"),
  "null": ("DeepSeek-V3", {"n_shared_experts": None}, "n_shared_experts=None"),
  "negative": ("DeepSeek-V3", {"kv_lora_rank": -1}, "kv_lora_rank=-1"),
  "infinite": ("DeepSeek-V3", {"rope_theta": float("inf")}, "rope_theta=inf"),
  "impossible": ("DeepSeek-V3", {"n_group": 7}, "model.n_expert_groups=7"),
  "a list for an object": ("DeepSeek-V3", {"rope_scaling": [1]}, "rope_scaling=[1]"),
  "our key": ("DeepSeek-V3", {OURS: {"dim": 1}}, "deepseek_jax.dim=1"),
  "our value": ("DeepSeek-V3", {OURS: {"name": 3}}, "deepseek_jax.name=3"),
  "our YaRN": ("DeepSeek-V3", {OURS: {"rope_factor": 8}}, "deepseek_jax.rope_factor=8"),
  "YaRN by length": (
    "deepseek-moe-16b-base",
    {OURS: {"rope_factor": 40.0, "yarn": "always"}},
    "deepseek_jax.yarn='always'",
  ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_we_do_not_have_is_refused_in_one_line(what):
  model, keys, complaint = REFUSED[what]
  with pytest.raises(ValueError) as error:
    read_config(changed(model, **keys))
  assert complaint in str(error.value)
  assert str(error.value).startswith("config.json")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["hidden_size", "rope_theta", "n_routed_experts"])
def test_a_missing_key_is_named(key, tmp_path):
  content = changed("DeepSeek-V3")
  del content[key]
  (tmp_path / "config.json").write_text(json.dumps(content))
  with pytest.raises(ValueError, match=f"{tmp_path}/config.json has no key {key}"):
    read_config(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff", "[" * 100_000, '{"a": 1e999}'])
def test_what_is_no_config_file(text, tmp_path):
  (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
  with pytest.raises(ValueError, match=r"config\.json"):
    read_config(tmp_path)
  with pytest.raises(FileNotFoundError, match="nowhere"):
    read_config(tmp_path / "nowhere")


def test_settings_without_a_word_are_not_written():
  for config, complaint in (
    (dataclasses.replace(TINY, mtp_concat="hidden_first"), "model.mtp_concat"),
    (dataclasses.replace(TINY, use_router_bias=False), "model.use_router_bias=False"),
    (dataclasses.replace(TINY, norm_topk_epsilon=1e-3), "model.norm_topk_epsilon"),
    (dataclasses.replace(V2_LITE, rope_interleaved=False), "model.rope_interleaved"),
  ):
    with pytest.raises(ValueError, match=complaint):
      write_config(config)
