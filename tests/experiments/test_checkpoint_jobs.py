"""import and export as jobs: round trips of whole workdirs, and what they refuse."""

import dataclasses
import json
import os
import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.config import CheckpointConfig, Config, MeshConfig
from deepseek_jax.io import workdir
from deepseek_jax.io.hf_config import Quantization
from deepseek_jax.io.hf_names import HF_SCALE, hf_places
from deepseek_jax.io.safetensors import INDEX, SafetensorsError
from deepseek_jax.train import loop
from experiments import jobs_checkpoints as jobs
from tests.io.hf_folders import QWEN, V2_LITE, V3, random_tensors
from tests.io.hf_folders import write_folder as write
from tests.io.test_hf_export import assert_same_files, tensors_of
from tests.small_runs import read_checkpoint, run, small_config

IMPORT = "experiments/configs/import.py"
EXPORT = "experiments/configs/export.py"


def do_import(path: Path, target: Path, dtype: str = "bfloat16") -> None:
  checkpoint = CheckpointConfig(path=str(path), dtype=dtype)  # pyright: ignore
  config = Config(job="import", checkpoint=checkpoint)
  jobs.import_checkpoint(config, str(target), jax.devices()[:1])


def do_export(source: Path, out: Path, **options) -> None:
  """On two devices, which the source need not have had."""
  checkpoint = CheckpointConfig(path=str(out), **options)
  train = dataclasses.replace(small_config().train, micro_batch_size=1)
  config = Config(
    job="export", checkpoint=checkpoint, mesh=MeshConfig(expert=2), train=train
  )
  jobs.export_checkpoint(config, str(source), jax.devices()[:2])


@pytest.mark.parametrize("kind", ["BF16", "F8_E4M3"])
def test_in_and_out_again(tmp_path, kind, capsys):
  """A workdir between two folders that are the same, byte by byte."""
  fp8 = kind == "F8_E4M3"
  folder = write(
    tmp_path / "hf",
    V3,
    random_tensors(V3, kind),
    max_bytes=2e5,
    quantization=Quantization() if fp8 else None,
  )
  (folder / "tokenizer_config.json").write_text('{"model_max_length": 163840}')
  do_import(folder, tmp_path / "run", "fp8" if fp8 else "bfloat16")
  assert workdir.read(tmp_path / "run").model == V3
  do_export(tmp_path / "run", tmp_path / "out", dtype="imported")
  assert_same_files(folder, tmp_path / "out")
  before = (tmp_path / "run" / "checkpoints" / "0").stat().st_mtime_ns
  do_import(folder, tmp_path / "run", "fp8" if fp8 else "bfloat16")  # nothing to do
  assert (tmp_path / "run" / "checkpoints" / "0").stat().st_mtime_ns == before
  assert "exported: " in capsys.readouterr().out
  if fp8:  # the same numbers, whether multiplied out before or after
    do_export(tmp_path / "run", tmp_path / "a")
    do_import(folder, tmp_path / "wide")
    do_export(tmp_path / "wide", tmp_path / "b")
    found, want = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert {n: t.tobytes() for n, t in found.items()} == {
      n: t.tobytes() for n, t in want.items()
    }


def test_a_dense_model_after_an_interruption(tmp_path):
  """What a killed import left is no checkpoint: the same command starts again."""
  folder = write(tmp_path / "hf", QWEN, random_tensors(QWEN))
  do_import(folder, tmp_path / "run")
  whole = tmp_path / "run" / "checkpoints" / "0"
  whole.rename(whole.with_name("0.orbax-checkpoint-tmp-1"))  # as Orbax names a part
  do_import(folder, tmp_path / "run")
  assert os.listdir(tmp_path / "run" / "checkpoints") == ["0"]
  assert workdir.read(tmp_path / "run").model == QWEN
  do_export(tmp_path / "run", tmp_path / "out", dtype="imported")
  assert_same_files(folder, tmp_path / "out")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
  """A run in progress: 3 of 12 steps, with a moving average."""
  target = tmp_path_factory.mktemp("trained") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "finish", lambda *_: None)  # no samples, no plots
    loop.train(small_config(steps=3), target, jax.devices()[:1])
  return target


@pytest.mark.parametrize("average", [False, True])
def test_weights_of_a_run(trained, tmp_path, average):
  """Its FP32 masters or their average, rounded to BF16, and to FP8 from that."""
  do_export(trained, tmp_path / "out", average=average)
  found = tensors_of(tmp_path / "out")
  checkpoint = read_checkpoint(trained)
  state = checkpoint["state"]
  arrays = checkpoint["ema"] if average else state["params"] | state["bias"]
  config = workdir.read(trained).model
  for name, place in hf_places(config).items():
    last = slice(place.start, place.start + place.body[-1])
    body = arrays[place.path][place.index][..., last]
    want = body.reshape(place.shape[::-1]).T if place.ins else body
    dtype = np.float32 if place.wide else ml_dtypes.bfloat16
    assert found[name].tobytes() == want.astype(dtype).tobytes(), name
  assert (tmp_path / "out" / "tokenizer.json").exists()
  do_export(trained, tmp_path / "fp8", average=average, dtype="fp8")
  scale = tensors_of(tmp_path / "fp8")[
    "model.layers.0.self_attn.o_proj.weight_scale_inv"
  ]
  rounded = found["model.layers.0.self_attn.o_proj.weight"].astype(np.float32)
  assert scale[0, 0] == np.float32(np.abs(rounded).max()) / np.float32(448)


def test_the_other_formats(trained, tmp_path):
  do_export(trained, tmp_path / "orbax", format="orbax", stacked=False, dtype="fp8")
  metadata = json.loads((tmp_path / "orbax" / "metadata.json").read_text())
  assert "layers.0.attn.wo_scale" in metadata["parameters"]
  do_export(trained, tmp_path / "maxtext", format="maxtext", dtype="float32")
  assert (tmp_path / "maxtext" / "0" / "items").is_dir()


def test_a_run_starts_from_weights(trained, tmp_path):
  """What was exported and imported again is where the new run begins."""
  do_export(trained, tmp_path / "hf", dtype="float32")
  do_import(tmp_path / "hf", tmp_path / "imported", "float32")
  start = CheckpointConfig(path=str(tmp_path / "imported"))
  config = dataclasses.replace(small_config(), checkpoint=start)
  begun = loop.begin(config, tmp_path / "new", jax.devices()[:1])
  want = read_checkpoint(trained)["state"]
  for path, array in (begun.state.params | begun.state.bias).items():
    old = want["bias" if path.endswith("router.bias") else "params"][path]
    np.testing.assert_array_equal(np.asarray(array), old, err_msg=path)
  loop._close(begun)
  model = dataclasses.replace(config.model, dim=64)
  with pytest.raises(ValueError, match=r"holds another model: embed\.weight"):
    loop.begin(
      dataclasses.replace(config, model=model), tmp_path / "other", jax.devices()[:1]
    )


def test_settings_that_do_not_fit(trained, tmp_path):
  folder = write(tmp_path / "hf", V2_LITE, random_tensors(V2_LITE))
  for dtype, says in (
    ("fp8_ue8m0", "cannot be imported"),
    ("fp8", "holds no FP8 weights"),
  ):
    with pytest.raises(ValueError, match=says):
      do_import(folder, tmp_path / "run", dtype)
  with pytest.raises(ValueError, match=r"checkpoint\.path is empty"):
    jobs.import_checkpoint(Config(job="import"), str(tmp_path / "run"))
  do_import(folder, tmp_path / "run")
  other = write(tmp_path / "other", V3, random_tensors(V3))
  with pytest.raises(ValueError, match=r"belongs to another config: .*model\.name"):
    do_import(other, tmp_path / "run")
  with pytest.raises(ValueError, match="run keeps no moving average"):
    do_export(tmp_path / "run", tmp_path / "out", average=True)
  with pytest.raises(ValueError, match=r"dtype=imported needs .* import"):
    do_export(trained, tmp_path / "out", dtype="imported")
  with pytest.raises(FileNotFoundError):
    do_export(tmp_path / "absent", tmp_path / "out")
  with pytest.raises(SafetensorsError, match="hf exists already"):
    do_export(tmp_path / "run", folder)
  assert sorted(os.listdir(tmp_path)) == ["hf", "other", "run"]


def _fails(*arguments, **options) -> str:
  """The one line on stderr of a command that must end with exit code 1."""
  code, out, err = run(*arguments, **options)
  assert code == 1, (code, out, err)
  lines = err.strip().splitlines()
  assert len(lines) == 1, err
  assert lines[0].startswith("error: ")
  return lines[0]


def test_damage_is_one_line_on_the_command_line(tmp_path):
  tensors = random_tensors(V3, "F8_E4M3")
  name = "model.layers.1.mlp.experts.3.down_proj.weight"
  tensors[name + HF_SCALE][0, 0] = np.nan
  folder = write(tmp_path / "nan", V3, tensors, max_bytes=2e5)
  path = f"--config.checkpoint.path={folder}"
  line = _fails(tmp_path / "run", path, config=IMPORT)
  assert re.search(
    rf"nan/model-\d+-of-\d+\.safetensors: {name}{HF_SCALE} holds nan", line
  )
  assert not (tmp_path / "run").exists()
  index = json.loads((folder / INDEX).read_text())
  index["weight_map"][name] = "../../etc/passwd"
  (folder / INDEX).write_text(json.dumps(index))
  line = _fails(tmp_path / "run", path, config=IMPORT)
  assert f"{INDEX} places {name} in ../../etc/passwd" in line
  line = _fails(tmp_path / "run", "--config.checkpoint.dtype=int4", config=EXPORT)
  assert "checkpoint.dtype='int4' must be one of bfloat16" in line
  assert os.listdir(tmp_path) == ["nan"]
