"""Checkpoints in: values, places, memory, and what is refused."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.io.hf_check import open_checkpoint
from deepseek_jax.io.hf_config import Quantization, read_config
from deepseek_jax.io.hf_import import (
  FP8,
  compute_targets,
  fp8_targets,
  load,
  load_arrays,
  make_skeleton,
)
from deepseek_jax.io.hf_names import HF_SCALE, hf_places
from deepseek_jax.io.safetensors import SafetensorsError
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.layers import named_variables
from tests.fixtures import weights
from tests.io.hf_folders import MODELS, MOE, QWEN, V2_LITE, V3, random_tensors
from tests.io.hf_folders import write_folder as write

BF16 = ml_dtypes.bfloat16
TINY_V3 = weights.FOLDER / "hf_tiny_v3"


def dequantised(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Weights of an FP8 checkpoint in FP32, block by block as DeepSeek's code has it."""
  found = {}
  for name, value in tensors.items():
    if name.endswith(HF_SCALE):
      continue
    value, scale = value.astype(np.float32), tensors.get(name + HF_SCALE)
    if scale is not None:
      for i, j in np.ndindex(scale.shape):
        block = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        value[block] *= scale[i, j]
    found[name] = value
  return found


def expected(config, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Our parameters, put together with plain NumPy from FP32 tensors."""
  shapes = {n: v.shape for n, v in named_variables(make_skeleton(config)).items()}
  found = {path: np.full(shape, np.nan, np.float32) for path, shape in shapes.items()}
  for name, place in hf_places(config).items():
    value = tensors[name]
    if place.ins:
      value = value.T
    value = value.reshape(place.body)
    last = slice(place.start, place.start + place.body[-1])
    found[place.path][place.index][..., last] = value
  return found


@pytest.mark.parametrize(
  "name", ["small_v3", "small_v2_lite", "small_moe", "small_qwen"]
)
def test_every_weight_arrives(tmp_path, name):
  config = MODELS[name]
  tensors = random_tensors(config)
  folder = write(tmp_path / name, config, tensors, max_bytes=1e5)
  model, found = load(folder, progress=False)
  assert found == config
  want = expected(config, dequantised(tensors))
  for path, variable in named_variables(model).items():
    high = variable.get_metadata().get("high_precision")
    assert variable.dtype == (jnp.float32 if high else jnp.bfloat16), path
    got = np.asarray(variable[...]).astype(np.float32)
    np.testing.assert_array_equal(got, want[path], err_msg=path)


@pytest.mark.parametrize("stored", ["F32", "E8M0"])
def test_fp8_becomes_bf16_exactly(tmp_path, stored):
  """Ragged blocks included; FP32 scales, and powers of two stored as exponents."""
  tensors = random_tensors(V3, "F8_E4M3", power_of_two=stored == "E8M0")
  want = expected(V3, dequantised(tensors))
  if stored == "E8M0":
    for name in tensors:
      if name.endswith(HF_SCALE):
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e8m0fnu)
  folder = write(tmp_path / "m", V3, tensors, quantization=Quantization())
  model, _ = load(folder, progress=False)
  wide, _ = load(folder, dtype=jnp.float32, progress=False)
  wide = named_variables(wide)
  for path, variable in named_variables(model).items():
    rounded = want[path].astype(np.dtype(variable.dtype))
    np.testing.assert_array_equal(np.asarray(variable[...]), rounded, err_msg=path)
    np.testing.assert_array_equal(np.asarray(wide[path][...]), want[path])


def test_fp8_is_kept(tmp_path):
  tensors = random_tensors(V3, "F8_E4M3")
  folder = write(tmp_path / "m", V3, tensors, quantization=Quantization())
  source = open_checkpoint(folder)
  assert source.quantization == Quantization()
  arrays = load_arrays(source, fp8_targets(source, None), progress=False)
  codes = arrays["moe_blocks.attn.wkv_a"]
  scales = arrays["moe_blocks.attn.wkv_a.scale"]
  assert (codes.dtype, codes.shape) == (FP8, (2, 160, 160))
  assert (scales.dtype, scales.shape) == (jnp.float32, (2, 2, 2))
  name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
  assert np.asarray(codes[0]).tobytes() == tensors[name].T.tobytes()
  np.testing.assert_array_equal(scales[0], tensors[name + HF_SCALE].T)
  up = "model.layers.2.mlp.experts.5.up_proj.weight"
  experts = np.asarray(arrays["moe_blocks.ffn.experts.w13"])
  assert experts[1, 5, :, 24:].tobytes() == tensors[up].T.tobytes()
  side = arrays["moe_blocks.ffn.experts.w13.scale"]
  assert side.shape == (2, 8, 2, 2)
  np.testing.assert_array_equal(side[1, 5, :, 1:], tensors[up + HF_SCALE].T)
  assert arrays["embed.weight"].dtype == jnp.bfloat16
  assert arrays["moe_blocks.ffn.router.bias"].dtype == jnp.float32


@pytest.mark.parametrize("kind", ["BF16", "F8_E4M3"])
def test_each_device_gets_its_shard(tmp_path, kind):
  """Splits that models use, and splits that none does, against the whole."""
  config = dataclasses.replace(V3, n_layers=4, n_dense_layers=2)
  folder = write(tmp_path / "m", config, random_tensors(config, kind))
  source = open_checkpoint(folder)
  mesh = make_mesh(pipeline=2, data=2, expert=2)
  plain = compute_targets(make_skeleton(config), None, jnp.bfloat16)
  split = compute_targets(make_skeleton(config), mesh, jnp.bfloat16)
  everywhere = {  # across heads, halves and rows that share a block
    "embed.weight": P(None, "data"),
    "head.weight": P(("data", "expert")),
    "moe_blocks.attn.wq_b": P("pipeline", "data", "expert", None),
    "moe_blocks.attn.wkv_b": P(None, None, "data", "expert"),
    "moe_blocks.attn.wo": P(None, ("data", "expert"), "pipeline", None),
    "moe_blocks.ffn.experts.w13": P("pipeline", "expert", None, "data"),
    "moe_blocks.ffn.shared.w13": P(None, "data", ("pipeline", "expert")),
  }
  for path, spec in everywhere.items():
    shape, dtype = split[path].shape, split[path].dtype
    split[path] = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
  del split["dense_blocks.ffn.w2"]  # only what is asked for is read
  whole = load_arrays(source, plain, progress=False)
  parts = load_arrays(source, split, progress=False)
  assert set(parts) == set(split)
  split_experts = P("pipeline", ("node", "expert"))
  assert parts["moe_blocks.ffn.experts.w2"].sharding.spec == split_experts
  for path, array in parts.items():
    assert array.sharding == split[path].sharding
    np.testing.assert_array_equal(np.asarray(array), np.asarray(whole[path]))
  if kind == "F8_E4M3":
    kept = load_arrays(source, fp8_targets(source, mesh), progress=False)
    scales = kept["moe_blocks.ffn.experts.w13.scale"]
    assert scales.sharding.spec == split_experts


@pytest.mark.parametrize("name", ["v3_mtp", "v2_lite"])
def test_logits_of_an_imported_model(tmp_path, name):
  """Hugging Face's logits from the folder that it would read."""
  meta, arrays = weights.load(name)
  config, _ = read_config(meta["config"])
  folder = write(tmp_path / name, config, weights.draw_all(meta))
  model, found = load(folder, dtype=jnp.float32, max_seq_len=256, progress=False)
  assert found == dataclasses.replace(config, max_seq_len=256, name=found.name)
  with jax.default_matmul_precision("highest"):
    logits = jax.jit(lambda m, ids: m.logits(ids))(model, arrays["ids"])
  np.testing.assert_allclose(logits, arrays["logits32"], atol=2e-5, rtol=0)


def test_a_folder_as_released():
  """V3's form, written by the safetensors library: FP8 blocks, an MTP layer, two files.

  Logits are transformers', which needed its weights dequantised first.
  """
  want = np.load(TINY_V3 / "expected.npz")
  model, config = load(TINY_V3, dtype=jnp.float32, max_seq_len=64, progress=False)
  named = named_variables(model)
  for key in want.files:
    name = key.removeprefix("dequantised/")
    if name != key:
      place = hf_places(config)[name]
      last = slice(place.start, place.start + place.body[-1])
      ours = np.asarray(named[place.path][...])[place.index][..., last]
      np.testing.assert_array_equal(ours.reshape(place.shape[::-1]).T, want[key])

  def compute(model, ids):
    hidden = model(ids).hidden_BTD
    (ahead,), _ = model.look_ahead(hidden[:, :-1], ids[:, 1:])
    return model.head(model.norm(hidden)), model.head(ahead)

  with jax.default_matmul_precision("highest"):
    logits, ahead = jax.jit(compute)(model, want["ids"])
  np.testing.assert_allclose(logits, want["logits"], atol=2e-5, rtol=0)
  np.testing.assert_allclose(ahead, want["mtp1_logits"], atol=2e-5, rtol=0)


NAME = "model.layers.1.mlp.experts.3.down_proj.weight"


def test_weights_that_contradict_the_config(tmp_path):
  tensors = random_tensors(V3)

  def refuse(changes, says, config=V3):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    changed = {n: t for n, t in (tensors | changes).items() if t is not None}
    write(folder, config, changed)
    with pytest.raises(SafetensorsError, match=says) as caught:
      load(folder, progress=False)
    assert len(str(caught.value).splitlines()) == 1
    assert str(folder) in str(caught.value)

  refuse({NAME: None}, rf"{NAME} \[160, 24\] is missing")
  refuse({NAME: tensors[NAME].T}, rf"{NAME} is \[24, 160\].* asks for \[160, 24\]")
  refuse({NAME: tensors[NAME].astype(np.int32)}, rf"{NAME} has dtype I32")
  refuse({NAME: tensors[NAME].astype(FP8)}, rf"{NAME} is FP8, but .*scale_inv is miss")
  refuse({NAME + HF_SCALE: np.ones((2, 1), np.float32)}, rf"{NAME} is BF16, yet")
  refuse({"model.extra": np.ones(3)}, r"model\.safetensors: model\.extra is no tensor")
  refuse({}, r"is no tensor .*\(2 layers\)", dataclasses.replace(V3, n_layers=2))
  refuse(
    {},
    "experts.8.gate_proj.weight .* miss",
    dataclasses.replace(V3, n_routed_experts=16),
  )
  embedding = tensors["model.embed_tokens.weight"].copy()
  embedding[-1, -1] += 1
  copy = "model.layers.3.embed_tokens.weight"
  refuse({copy: embedding}, rf"{copy} differs from model\.embed_tokens\.weight")
  refuse({copy: embedding.astype(np.float32)}, rf"{copy} has another dtype")
  computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
  folder = write(tmp_path / "computed", V3, tensors | computed)
  assert open_checkpoint(folder).config == dataclasses.replace(V3, name="small_v3")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_a_scale_that_is_none(tmp_path, bad):
  tensors = random_tensors(V3, "F8_E4M3")
  tensors[NAME + HF_SCALE][1, 0] = bad
  with pytest.raises(SafetensorsError, match=rf"model\.safetensors: {NAME}{HF_SCALE}"):
    open_checkpoint(write(tmp_path / "m", V3, tensors))
  tensors[NAME + HF_SCALE] = np.ones((1, 1), np.float32)
  with pytest.raises(SafetensorsError, match=r"F32\[1, 1\], but .* is \[2, 1\]"):
    open_checkpoint(write(tmp_path / "n", V3, tensors))


def test_fp8_in_part(tmp_path):
  tensors = random_tensors(V3, "F8_E4M3")
  tensors[NAME] = tensors[NAME].astype(BF16)
  del tensors[NAME + HF_SCALE]
  source = open_checkpoint(write(tmp_path / "m", V3, tensors))
  with pytest.raises(SafetensorsError, match=f"{NAME} is not FP8, unlike"):
    fp8_targets(source, None)


def test_a_checkpoint_without_its_mtp_layer(tmp_path, caplog):
  """As transformers saves V3."""
  tensors = random_tensors(V3)
  kept = {n: t for n, t in tensors.items() if not n.startswith("model.layers.3.")}
  with caplog.at_level(logging.WARNING, "deepseek_jax"):
    source = open_checkpoint(write(tmp_path / "m", V3, kept))
  assert source.config.n_mtp_layers == 0
  assert "holds no MTP layer" in caplog.text
  del kept["model.layers.0.input_layernorm.weight"]
  with pytest.raises(SafetensorsError, match=r"0\.input_layernorm\.weight .* missing"):
    open_checkpoint(write(tmp_path / "n", V3, kept))


def test_folders_that_are_none(tmp_path):
  with pytest.raises(FileNotFoundError, match="absent is no folder"):
    load(tmp_path / "absent")
  folder = write(tmp_path / "m", MOE, random_tensors(MOE), max_bytes=1e5)
  last = sorted(folder.glob("*.safetensors"))[-1]
  data = last.read_bytes()
  last.write_bytes(data[:-1])
  with pytest.raises(SafetensorsError, match=f"{last.name} is cut off"):
    load(folder)
  last.unlink()
  with pytest.raises(SafetensorsError, match=f"{last.name} is missing"):
    load(folder)
  content = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(content | {"hidden_size": "x"}))
  with pytest.raises(ValueError, match="hidden_size"):
    load(folder)


def test_models_of_one_layer_kind():
  assert "dense_blocks.attn.wo" not in named_variables(
    make_skeleton(dataclasses.replace(V2_LITE, n_dense_layers=0))
  )
  assert "blocks.attn.bq" in named_variables(make_skeleton(QWEN))
