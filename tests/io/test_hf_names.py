"""The table of names against our models' shapes and the released checkpoints."""

import collections
import dataclasses
import math

import jax
import pytest

from deepseek_jax import presets
from deepseek_jax.dense_config import DENSE_PRESETS, DenseConfig
from deepseek_jax.io.hf_names import HF_SCALE, hf_names, hf_places, our_shapes
from deepseek_jax.model.dense import DenseTransformer
from deepseek_jax.model.layers import named_variables
from deepseek_jax.model.transformer import Transformer

MODELS = presets.PRESETS | DENSE_PRESETS
TIED = dataclasses.replace(DENSE_PRESETS["tiny_dense"], tie_embeddings=True)


def shapes_of_model(config) -> dict[str, tuple[int, ...]]:
  kind = DenseTransformer if isinstance(config, DenseConfig) else Transformer
  skeleton = jax.eval_shape(lambda: kind(config, jax.random.key(0)))
  return {name: v.shape for name, v in named_variables(skeleton).items()}


@pytest.mark.parametrize("name", [*MODELS, "tied"])
def test_the_table_is_a_bijection(name):
  """Every element of every parameter comes from one place of one tensor."""
  config = MODELS.get(name, TIED)
  places = hf_places(config)
  own = [place for place in places.values() if not place.copy]
  shapes = shapes_of_model(config)
  assert our_shapes(own) == shapes
  elements = collections.Counter()
  seen = set()
  for place in own:
    assert math.prod(place.shape) == math.prod(place.body)
    stacked = len(place.index)
    whole = shapes[place.path]
    assert whole[stacked:-1] == place.body[:-1]
    assert place.start % place.body[-1] == 0  # halves of w13 do not overlap
    assert place.start + place.body[-1] <= whole[-1]
    assert (place.path, place.index, place.start) not in seen
    seen.add((place.path, place.index, place.start))
    elements[place.path] += math.prod(place.shape)
  assert elements == {path: math.prod(shape) for path, shape in shapes.items()}


def test_v3_has_the_released_names_and_shapes():
  """deepseek-ai/DeepSeek-V3: its index, and the shapes in its files' headers."""
  places = hf_places(presets.V3)
  assert len(hf_names(presets.V3, fp8=True)) == 91_991
  assert sum(place.fp8 for place in places.values()) == 45_808
  total = sum(math.prod(place.shape) for place in places.values())
  assert total == 684_489_845_504  # 671,026,419,200 and layer 61 with its copies
  main = {
    "model.embed_tokens.weight": (129280, 7168),
    "lm_head.weight": (129280, 7168),
    "model.norm.weight": (7168,),
  }
  attention = {
    "q_a_proj.weight": (1536, 7168),
    "q_a_layernorm.weight": (1536,),
    "q_b_proj.weight": (24576, 1536),
    "kv_a_proj_with_mqa.weight": (576, 7168),
    "kv_a_layernorm.weight": (512,),
    "kv_b_proj.weight": (32768, 512),
    "o_proj.weight": (7168, 16384),
  }
  every = {
    "input_layernorm.weight": (7168,),
    "post_attention_layernorm.weight": (7168,),
  } | {f"self_attn.{name}": shape for name, shape in attention.items()}

  def swiglu(name, hidden):
    return {
      f"mlp.{name}gate_proj.weight": (hidden, 7168),
      f"mlp.{name}up_proj.weight": (hidden, 7168),
      f"mlp.{name}down_proj.weight": (7168, hidden),
    }

  moe = swiglu("shared_experts.", 2048) | {
    "mlp.gate.weight": (256, 7168),
    "mlp.gate.e_score_correction_bias": (256,),
  }
  for i in range(256):
    moe |= swiglu(f"experts.{i}.", 2048)
  mtp = {
    "embed_tokens.weight": (129280, 7168),
    "enorm.weight": (7168,),
    "hnorm.weight": (7168,),
    "eh_proj.weight": (7168, 14336),
    "shared_head.norm.weight": (7168,),
    "shared_head.head.weight": (129280, 7168),
  }
  released = dict(main)
  for layer in range(62):
    here = every | (swiglu("", 18432) if layer < 3 else moe)
    here |= mtp if layer == 61 else {}
    released |= {f"model.layers.{layer}.{name}": s for name, s in here.items()}
  assert {name: place.shape for name, place in places.items()} == released
  plain = ("norm", "gate.", "embed", "head", "eh_proj")
  for name, place in places.items():
    assert place.fp8 == (not any(word in name for word in plain))
    assert place.wide == name.endswith("e_score_correction_bias")
    assert place.copy == (
      name
      in (
        "model.layers.61.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight",
      )
    )


def test_scales_of_v3():
  """One for each 128x128 block, ragged ones at the edges; 5 rows for 576."""
  places = hf_places(presets.V3)
  a = "model.layers.3.self_attn."
  assert places[a + "kv_a_proj_with_mqa.weight"].scale.shape == (5, 56)
  assert places[a + "q_a_proj.weight"].scale.shape == (12, 56)
  assert places[a + "o_proj.weight"].scale.shape == (56, 128)
  scales = our_shapes(place.scale for place in places.values() if place.fp8)
  assert scales["moe_blocks.ffn.experts.w13.scale"] == (58, 256, 56, 32)
  assert scales["moe_blocks.attn.wkv_a.scale"] == (58, 56, 5)
  assert scales["mtp.0.block.attn.wq_b.scale"] == (12, 192)
  name = "model.layers.0.mlp.up_proj.weight"
  assert name + HF_SCALE in hf_names(presets.V3, fp8=True)
  assert places[name].scale.start == 18432 // 128


def test_names_of_the_other_families():
  lite = hf_places(presets.V2_LITE)
  assert lite["model.layers.1.self_attn.q_proj.weight"].shape == (16 * 192, 2048)
  assert lite["model.layers.1.mlp.shared_experts.up_proj.weight"].shape == (2816, 2048)
  assert "model.layers.1.mlp.gate.e_score_correction_bias" not in lite
  assert "model.layers.27.enorm.weight" not in lite
  assert "model.layers.0.self_attn.q_a_proj.weight" in hf_places(presets.V2)
  moe = hf_places(presets.MOE_16B)
  assert moe["model.layers.27.self_attn.k_proj.weight"].shape == (2048, 2048)
  qwen = hf_places(DENSE_PRESETS["r1_distill_qwen_7b"])
  assert qwen["model.layers.0.self_attn.k_proj.bias"].shape == (512,)
  llama = hf_places(DENSE_PRESETS["r1_distill_llama_8b"])
  assert "model.layers.0.self_attn.k_proj.bias" not in llama
  assert llama["lm_head.weight"].shape == (128256, 4096)
  assert "lm_head.weight" not in hf_places(TIED)


def test_a_config_without_counterpart():
  config = dataclasses.replace(presets.TINY, mtp_concat="hidden_first")
  with pytest.raises(ValueError, match="mtp_concat=hidden_first has no place"):
    hf_places(config)
