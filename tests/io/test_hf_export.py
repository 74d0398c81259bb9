"""Checkpoints out: the same bytes as came in, and what is refused."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.io.fp8_weights import dequantise_arrays
from deepseek_jax.io.hf_check import open_checkpoint
from deepseek_jax.io.hf_config import Quantization
from deepseek_jax.io.hf_export import Layout, export_hf
from deepseek_jax.io.hf_import import (
  compute_targets,
  fp8_targets,
  load,
  load_arrays,
  make_skeleton,
)
from deepseek_jax.io.hf_names import HF_SCALE, hf_names, hf_places
from deepseek_jax.io.safetensors import SafetensorsError, SafetensorsFolder
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.layers import named_variables
from tests.fixtures import weights
from tests.io.hf_folders import MODELS, V2_LITE, V3, random_tensors, write_folder

ROOT = Path(__file__).resolve().parent.parent.parent


def arrays_of(folder: Path, mesh=None, fp8: bool = False):
  source = open_checkpoint(folder)
  if fp8:
    targets = fp8_targets(source, mesh)
  else:
    targets = compute_targets(make_skeleton(source.config), mesh, jnp.bfloat16)
  return source, load_arrays(source, targets, progress=False)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
  files = SafetensorsFolder(folder)
  return {name: files.read(name) for name in files.where}


def assert_same_tensors(one: dict, other: dict) -> None:
  assert set(one) == set(other)
  for name, tensor in one.items():
    assert tensor.dtype == other[name].dtype, name
    assert tensor.tobytes() == other[name].tobytes(), name


def assert_same_files(one: Path, other: Path) -> None:
  assert sorted(os.listdir(one)) == sorted(os.listdir(other))
  for path in one.iterdir():
    assert path.read_bytes() == (other / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", MODELS)
def test_bf16_comes_back_byte_by_byte(tmp_path, name):
  config = MODELS[name]
  tensors = random_tensors(config)
  folder = write_folder(tmp_path / name, config, tensors, max_bytes=2e5)
  source, arrays = arrays_of(folder)
  export_hf(arrays, source.config, tmp_path / "plain", progress=False)
  assert_same_tensors(tensors_of(tmp_path / "plain"), tensors)
  assert open_checkpoint(tmp_path / "plain").config == config
  layout = Layout.of(source.folder)
  layout.save(tmp_path / "layout.json")
  again = Layout.load(tmp_path / "layout.json")
  export_hf(arrays, source.config, tmp_path / "same", layout=again, progress=False)
  assert_same_files(folder, tmp_path / "same")


@pytest.mark.parametrize("name", ["small_v3", "small_v2", "small_v2_lite", "small_moe"])
@pytest.mark.parametrize("stored", ["F32", "E8M0"])
def test_fp8_comes_back_byte_by_byte(tmp_path, name, stored):
  config, power = MODELS[name], stored == "E8M0"
  tensors = random_tensors(config, "F8_E4M3", power_of_two=power)
  quantization = Quantization("ue8m0" if power else "float32")
  folder = write_folder(
    tmp_path / name, config, tensors, max_bytes=2e5, quantization=quantization
  )
  source, arrays = arrays_of(folder, fp8=True)
  dtype = "fp8_ue8m0" if power else "fp8"
  export_hf(arrays, config, tmp_path / "plain", dtype, progress=False)
  assert_same_tensors(tensors_of(tmp_path / "plain"), tensors)
  found = open_checkpoint(tmp_path / "plain")
  assert found.quantization == quantization
  if power:  # and as some files store them
    exponents = jnp.float8_e8m0fnu
    for scale in [n for n in tensors if n.endswith(HF_SCALE)]:
      tensors[scale] = tensors[scale].astype(exponents)
    folder = write_folder(tmp_path / "e8m0", config, tensors, quantization=quantization)
    source, arrays = arrays_of(folder, fp8=True)
  layout = Layout.of(source.folder)
  export_hf(arrays, config, tmp_path / "same", layout=layout, progress=False)
  assert_same_files(folder, tmp_path / "same")


def test_a_folder_as_released_comes_back(tmp_path):
  """Files that the safetensors library wrote."""
  folder = tmp_path / "m"
  shutil.copytree(weights.FOLDER / "hf_tiny_v3", folder)
  (folder / "expected.npz").unlink()
  source, arrays = arrays_of(folder, fp8=True)
  layout = Layout.of(source.folder)
  export_hf(arrays, source.config, tmp_path / "same", layout=layout, tokenizer=folder,
            progress=False)  # fmt: skip
  assert_same_files(folder, tmp_path / "same")


@pytest.mark.parametrize("fp8", [False, True])
def test_from_a_mesh(tmp_path, fp8):
  """Also from arrays split along axes that are no stacks, as ZeRO's."""
  tensors = random_tensors(V3, "F8_E4M3" if fp8 else "BF16")
  folder = write_folder(tmp_path / "m", V3, tensors)
  _, arrays = arrays_of(folder, make_mesh(data=2, expert=4), fp8)
  spec = jax.sharding.PartitionSpec(None, ("data", "expert"))
  for path in ("moe_blocks.attn.wkv_a", "embed.weight", "moe_blocks.ffn.shared.w13"):
    target = jax.sharding.NamedSharding(make_mesh(data=2, expert=4), spec)
    arrays[path] = jax.device_put(arrays[path], target)
  export_hf(arrays, V3, tmp_path / "out", "fp8" if fp8 else "bfloat16", progress=False)
  assert_same_tensors(tensors_of(tmp_path / "out"), tensors)


def test_quantised_here(tmp_path):
  """Codes and scales as the paper has them, on [out, in] blocks, halves apart."""
  tensors = random_tensors(V3)
  _, arrays = arrays_of(write_folder(tmp_path / "m", V3, tensors))
  for dtype in ("fp8", "fp8_ue8m0"):
    out = tmp_path / dtype
    export_hf(arrays, V3, out, dtype, progress=False)
    found = tensors_of(out)
    assert set(found) == set(hf_names(V3, fp8=True))
    for name, place in hf_places(V3).items():
      if not place.fp8:
        assert found[name].tobytes() == tensors[name].tobytes()
        continue
      wide, scale = tensors[name].astype(np.float32), found[name + HF_SCALE]
      for i, j in np.ndindex(scale.shape):
        block = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        amax = np.abs(wide[block]).max()
        want = np.float32(max(amax, 1e-4)) / np.float32(448)
        if dtype == "fp8_ue8m0":
          want = np.exp2(np.ceil(np.log2(want)))
        assert scale[i, j] == want
        codes = (wide[block] / want).astype(jnp.float8_e4m3fn)
        assert found[name][block].tobytes() == codes.tobytes()
    assert open_checkpoint(out).quantization.scale_format == (
      "float32" if dtype == "fp8" else "ue8m0"
    )


def test_fp8_kept_is_what_bf16_reads(tmp_path):
  """Kept codes, dequantised here or on export, are the BF16 of an import as BF16."""
  folder = write_folder(tmp_path / "m", V3, random_tensors(V3, "F8_E4M3"))
  _, plain = arrays_of(folder)
  _, kept = arrays_of(folder, fp8=True)
  places = hf_places(V3).values()
  back = dequantise_arrays(kept, places, jnp.bfloat16)
  assert set(back) == set(plain)
  for path, array in back.items():
    wide = plain[path].astype(array.dtype)
    assert np.asarray(wide).tobytes() == np.asarray(array).tobytes(), path
  export_hf(kept, V3, tmp_path / "a", progress=False)
  export_hf(plain, V3, tmp_path / "b", progress=False)
  assert_same_files(tmp_path / "a", tmp_path / "b")


def test_fp32_weights(tmp_path):
  model, config = load(write_folder(tmp_path / "m", V2_LITE, random_tensors(V2_LITE)))
  arrays = {
    path: np.asarray(v[...], np.float32) + np.float32(1e-6)
    for path, v in named_variables(model).items()
  }
  export_hf(arrays, config, tmp_path / "out", "float32", progress=False)
  model, _ = load(tmp_path / "out", dtype=jnp.float32, progress=False)
  for path, v in named_variables(model).items():
    np.testing.assert_array_equal(v[...], arrays[path])


def test_what_does_not_fit(tmp_path):
  folder = write_folder(tmp_path / "m", V3, random_tensors(V3))
  _, arrays = arrays_of(folder)

  def refuse(says, arrays=arrays, config=V3, **options):
    with pytest.raises(ValueError, match=says):
      export_hf(arrays, config, tmp_path / "out", progress=False, **options)
    assert os.listdir(tmp_path) == ["m"]

  refuse("dtype='int4' must be one of", dtype="int4")
  refuse("head.weight is missing", {n: a for n, a in arrays.items() if "head" not in n})
  refuse(r"head.weight is \[160, 96\], but .* \[160, 97\]",
         config=dataclasses.replace(V3, vocab_size=97))  # fmt: skip
  refuse("mtp_concat", config=dataclasses.replace(V3, mtp_concat="hidden_first"))
  layout = Layout.of(SafetensorsFolder(folder))
  refuse(r"layers\.3\.\S+ is no tensor of this model", layout=layout,
         config=dataclasses.replace(V3, n_mtp_layers=0))  # fmt: skip
  with pytest.raises(SafetensorsError, match="m exists already"):
    export_hf(arrays, V3, folder)


SLOW = """
import sys, time
import numpy as np
from deepseek_jax.io import hf_export, safetensors_write
from tests.io.hf_folders import V2_LITE
from deepseek_jax.io.hf_names import hf_places, our_shapes
arrays = {p: np.zeros(s, np.float32)
          for p, s in our_shapes(hf_places(V2_LITE).values()).items()}
fetch = hf_export._Tensors.fetch
def slowly(self, spec):
  time.sleep(0.05)
  return fetch(self, spec)
hf_export._Tensors.fetch = slowly
hf_export.export_hf(arrays, V2_LITE, sys.argv[1], file_bytes=1e5, progress=False)
"""


def test_killed_while_writing(tmp_path):
  """kill -9 leaves nothing under the final name, and the next export goes through."""
  out, part = tmp_path / "out", tmp_path / "out.part"
  process = subprocess.Popen(
    [sys.executable, "-c", SLOW, str(out)],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
  )
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline and len(list(part.glob("*.safetensors"))) < 2:
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert process.returncode == -signal.SIGKILL
  assert os.listdir(tmp_path) == ["out.part"]
  _, arrays = arrays_of(write_folder(tmp_path / "m", V2_LITE, random_tensors(V2_LITE)))
  export_hf(arrays, V2_LITE, out, progress=False)
  assert sorted(os.listdir(tmp_path)) == ["m", "out"]
  assert json.loads((out / "config.json").read_text())["model_type"] == "deepseek_v2"
