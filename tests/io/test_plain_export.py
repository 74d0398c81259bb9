"""Exports for other JAX projects: restored without ours, and under MaxText's names."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from deepseek_jax import presets
from deepseek_jax.io.fp8_weights import dequantise_arrays, quantise_arrays
from deepseek_jax.io.hf_import import assemble, make_skeleton
from deepseek_jax.io.hf_names import SCALE, hf_places
from deepseek_jax.io.maxtext_export import export_maxtext, maxtext_arrays
from deepseek_jax.io.plain_export import export_plain
from deepseek_jax.io.safetensors import SafetensorsError
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.layers import named_variables
from tests.io.hf_folders import MODELS, MOE, V2, V2_LITE, V3, random_tensors
from tests.io.hf_folders import write_folder as write
from tests.io.test_hf_export import arrays_of

FORWARD = Path(__file__).with_name("plain_forward.py")
TOKENS = np.random.default_rng(0).integers(0, 96, 13)


def logits_elsewhere(folder: Path, tmp_path: Path) -> np.ndarray:
  """What a program computes that cannot import this project, on another mesh."""
  out, tokens = tmp_path / "out.npy", tmp_path / "tokens.npy"
  np.save(tokens, TOKENS)
  environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
  done = subprocess.run(
    [sys.executable, "-I", str(FORWARD), str(folder), str(out), str(tokens)],
    cwd=tmp_path,
    env=environment | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return np.load(out)


def logits_here(config, arrays) -> np.ndarray:
  wide = {path: jnp.asarray(a, jnp.float32) for path, a in arrays.items()}
  model = assemble(make_skeleton(config), wide)
  with jax.default_matmul_precision("highest"):
    return np.asarray(jax.jit(lambda m, t: m.logits(t))(model, TOKENS[None])[0])


@pytest.mark.parametrize(
  ("config", "dtype", "stacked"),
  [(V3, "bfloat16", True), (V2_LITE, "fp8_ue8m0", False)],
  ids=lambda value: getattr(value, "name", str(value)),
)
def test_computed_with_orbax_alone(tmp_path, config, dtype, stacked):
  folder = write(tmp_path / "m", config, random_tensors(config))
  mesh = make_mesh(expert=2, devices=jax.devices()[:2])
  _, arrays = arrays_of(folder, mesh)
  export_plain(arrays, config, tmp_path / "out", dtype, stacked=stacked)
  found = logits_elsewhere(tmp_path / "out", tmp_path)
  if dtype.startswith("fp8"):
    places = [p for p in hf_places(config).values() if not p.copy]
    kept = quantise_arrays(arrays, places, dtype == "fp8_ue8m0")
    arrays = dequantise_arrays(kept, places, jnp.float32)
  want = logits_here(config, {p: np.asarray(a) for p, a in arrays.items()})
  np.testing.assert_allclose(found, want, atol=2e-4 * np.abs(want).max(), rtol=0)


def test_metadata_and_tree(tmp_path):
  """Every array that is there is described, and the other way round."""
  _, arrays = arrays_of(write(tmp_path / "m", V3, random_tensors(V3, "F8_E4M3")), None,
                        fp8=True)  # fmt: skip
  export_plain(arrays, V3, tmp_path / "out", "fp8")
  metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
  assert metadata["model"]["n_routed_experts"] == V3.n_routed_experts
  about = metadata["parameters"]["moe_blocks.ffn.experts.w13"]
  assert about == {
    "shape": [2, 8, 160, 48],
    "dtype": "float8_e4m3fn",
    "axes": ["layer", "expert", "dim", "gate_up"],
    "spec": ["pipeline", ["node", "expert"], None, None],
  }
  scale = metadata["parameters"]["moe_blocks.ffn.experts.w13_scale"]
  assert scale["shape"] == [2, 8, 2, 2]
  assert scale["axes"] == ["layer", "expert", "in/128", "out/128"]
  tree = ocp.StandardCheckpointer().restore((tmp_path / "out" / "params").absolute())
  flat = {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  assert set(flat) == set(metadata["parameters"])
  for path, array in arrays.items():
    name = path.removesuffix(SCALE) + ("_scale" if path.endswith(SCALE) else "")
    assert np.asarray(flat[name]).tobytes() == np.asarray(array).tobytes()
  with pytest.raises(SafetensorsError, match="exists already"):
    export_plain(arrays, V3, tmp_path / "out")
  with pytest.raises(ValueError, match="dtype='imported' must be one of"):
    export_plain(arrays, V3, tmp_path / "new", "imported")


@pytest.mark.parametrize("name", ["small_v3", "small_moe", "small_qwen"])
def test_every_family_unstacked(tmp_path, name):
  config = MODELS[name]
  _, arrays = arrays_of(write(tmp_path / "m", config, random_tensors(config)))
  export_plain(arrays, config, tmp_path / "out", stacked=False)
  described = json.loads((tmp_path / "out" / "metadata.json").read_text())["parameters"]
  total = sum(np.prod(about["shape"]) for about in described.values())
  assert total == sum(array.size for array in arrays.values())
  last = config.n_layers - 1
  assert described[f"layers.{last}.attn.wo"]["axes"] == ["head", "value", "dim"]
  for about in described.values():
    assert len(about["axes"]) == len(about["shape"]) == len(about["spec"])


def test_a_quantised_array_is_a_quantised_tensor():
  """Blocks are the same on our side of the transposition as on Hugging Face's."""
  places = [p for p in hf_places(V3).values() if not p.copy]
  named = named_variables(make_skeleton(V3))
  random = np.random.default_rng(0)
  paths = ("embed.weight", "moe_blocks.attn.wq_b", "moe_blocks.ffn.experts.w13")
  arrays = {
    path: jnp.asarray(random.standard_normal(named[path].shape), jnp.bfloat16)
    for path in paths
  }
  kept = quantise_arrays(arrays, places, False)
  weight = np.asarray(arrays["moe_blocks.attn.wq_b"][1], np.float32).reshape(136, -1)
  scale = np.asarray(kept["moe_blocks.attn.wq_b.scale"][1])
  assert scale.shape == (2, 1)
  amax = np.abs(weight[128:]).max()
  assert scale[1, 0] == np.float32(amax) / np.float32(448)
  back = dequantise_arrays(kept, places, jnp.float32)
  for path, array in arrays.items():
    bound = 0.07 * np.abs(np.asarray(array, np.float32)) + 0.01
    assert (np.abs(np.asarray(back[path]) - np.asarray(array)) <= bound).all(), path


# AI-Hypercomputer/maxtext, convert_deepseek_family_ckpt.py: its names and layout for
# deepseek3-671b (D 7168, 128 heads) and deepseek2-16b.
ATTENTION = {
  "self_attention.kv_norm.scale": (512,),
  "self_attention.wkv_a.kernel": (7168, 576),
  "self_attention.wkv_b.kernel": (512, 128, 256),
  "self_attention.out.kernel": (128, 128, 7168),
  "self_attention.q_norm.scale": (1536,),
  "self_attention.wq_a.kernel": (7168, 1536),
  "self_attention.wq_b.kernel": (1536, 128, 192),
  "pre_self_attention_layer_norm.scale": (7168,),
  "post_self_attention_layer_norm.scale": (7168,),
}
DENSE = {
  "mlp.wi_0.kernel": (7168, 18432),
  "mlp.wi_1.kernel": (7168, 18432),
  "mlp.wo.kernel": (18432, 7168),
}
BLOCK = "DeepSeekMoeBlock_0."
MOE_PART = {
  f"{BLOCK}shared_experts.wi_0.kernel": (7168, 2048),
  f"{BLOCK}shared_experts.wi_1.kernel": (7168, 2048),
  f"{BLOCK}shared_experts.wo.kernel": (2048, 7168),
  f"{BLOCK}MoeBlock_0.gate.kernel": (7168, 256),
  f"{BLOCK}MoeBlock_0.gate.bias": (256,),
}
EXPERTS = {
  f"{BLOCK}MoeBlock_0.wi_0": (256, 7168, 2048),
  f"{BLOCK}MoeBlock_0.wi_1": (256, 7168, 2048),
  f"{BLOCK}MoeBlock_0.wo": (256, 2048, 7168),
}
MTP = "mtp_block.mtp_layer_1."


def with_layers(shapes, n):
  """The layer axis second, as scanned layers have it."""
  return {name: (shape[0], n, *shape[1:]) for name, shape in shapes.items()}


def prefixed(prefix, shapes):
  return {prefix + name: shape for name, shape in shapes.items()}


def test_maxtext_names_and_shapes_of_v3(caplog):
  shapes = {
    path: jax.ShapeDtypeStruct(v.shape, jnp.bfloat16)
    for path, v in named_variables(make_skeleton(presets.V3)).items()
  }
  with caplog.at_level(logging.WARNING, "deepseek_jax"):
    found = jax.eval_shape(lambda a: maxtext_arrays(a, presets.V3), shapes)
  assert "mtp.0.norm.weight is left out" in caplog.text
  dense = with_layers(ATTENTION | DENSE, 3)
  moe = with_layers(ATTENTION | MOE_PART | EXPERTS, 58)
  want = {
    "token_embedder.embedding": (129280, 7168),
    "decoder.decoder_norm.scale": (7168,),
    "decoder.logits_dense.kernel": (7168, 129280),
    f"{MTP}mtp_1_embedding_norm.scale": (7168,),
    f"{MTP}mtp_1_hidden_state_norm.scale": (7168,),
    f"{MTP}mtp_1_projection.kernel": (14336, 7168),
    **prefixed("decoder.dense_layers.", dense),
    **prefixed("decoder.moe_layers.", moe),
    **prefixed(f"{MTP}mtp_1_transformer_layer.", ATTENTION | MOE_PART | EXPERTS),
  }
  assert {name: x.shape for name, x in found.items()} == want


@pytest.mark.parametrize("config", [V3, V2_LITE], ids=lambda c: c.name)
def test_maxtext_values(tmp_path, config):
  tensors = random_tensors(config)
  _, arrays = arrays_of(write(tmp_path / "m", config, tensors))
  export_maxtext(arrays, config, tmp_path / "out")
  path = (tmp_path / "out" / "0" / "items").absolute()
  tree = ocp.StandardCheckpointer().restore(path)["params"]["params"]

  def same(array, name):
    assert np.asarray(array).tobytes() == tensors[name].tobytes(), name

  decoder, layer = tree["decoder"], "model.layers.2."
  same(tree["token_embedder"]["embedding"], "model.embed_tokens.weight")
  same(decoder["logits_dense"]["kernel"].T, "lm_head.weight")
  moe = decoder["moe_layers"]
  experts = moe["DeepSeekMoeBlock_0"]["MoeBlock_0"]
  same(experts["wi_1"][5, 1].T, layer + "mlp.experts.5.up_proj.weight")
  same(experts["wo"][3, 1].T, layer + "mlp.experts.3.down_proj.weight")
  same(experts["gate"]["kernel"][:, 1].T, layer + "mlp.gate.weight")
  up = moe["self_attention"]["wkv_b"]["kernel"][:, 1]
  same(up.reshape(len(up), -1).T, layer + "self_attn.kv_b_proj.weight")
  gain = moe["pre_self_attention_layer_norm"]["scale"]
  same(gain[:, 1], layer + "input_layernorm.weight")
  same(decoder["dense_layers"]["mlp"]["wi_0"]["kernel"][:, 0].T,
       "model.layers.0.mlp.gate_proj.weight")  # fmt: skip
  queries = moe["self_attention"]
  if config.q_lora_rank:
    name, array = "q_b_proj", queries["wq_b"]["kernel"][:, 1]
  else:
    name, array = "q_proj", queries["query"]["kernel"][:, 1]
  same(array.reshape(len(array), -1).T, f"{layer}self_attn.{name}.weight")


def test_what_maxtext_does_not_have(tmp_path):
  for config, dtype, says in (
    (MOE, "bfloat16", "no latent attention"),
    (V2, "fp8", "dtype='fp8' must be bfloat16 or float32"),
  ):
    with pytest.raises(ValueError, match=says):
      export_maxtext({}, config, tmp_path / "out", dtype)
  assert os.listdir(tmp_path) == []
