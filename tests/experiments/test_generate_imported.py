"""From a Hugging Face folder to an answer, and its logits against transformers'.

The folder is tests/fixtures/hf_tiny_v3 (see make_hf_folder.py): V3's form in FP8, with
an MTP layer, tokenizer and chat template.
"""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import CheckpointConfig, Config, GenerateConfig, MeshConfig
from deepseek_jax.data.chat import ChatTokenizer
from deepseek_jax.infer.generate import generate
from deepseek_jax.io.fp8_weights import dequantise_tensor
from deepseek_jax.io.hf_import import load
from deepseek_jax.io.safetensors import SafetensorsFolder
from deepseek_jax.io.workdir import claim
from deepseek_jax.precision.tiles import Fp8Weight
from experiments import jobs
from experiments.jobs_checkpoints import import_checkpoint
from tests.fixtures import weights

FOLDER = weights.FOLDER / "hf_tiny_v3"


def job_config(job: str, **settings) -> Config:
  config = Config(job=job, mesh=MeshConfig(data=8), **settings)
  return dataclasses.replace(
    config, train=dataclasses.replace(config.train, batch_size=8)
  )


def test_logits_are_those_of_transformers():
  """Also those of the MTP layer; transformers was given dequantised weights."""
  with np.load(FOLDER / "expected.npz") as file:
    expected = dict(file)
  model, config = load(FOLDER, dtype=jnp.float32, progress=False)
  ids = expected["ids"]

  @jax.jit
  def every(model, ids):
    hidden = model(ids).hidden_BTD
    ahead, _ = model.look_ahead(hidden[:, :-1], ids[:, 1:])
    return model.head(model.norm(hidden)), model.head(ahead[0])

  found, ahead = every(model, ids)
  np.testing.assert_allclose(found, expected["logits"], rtol=0, atol=2e-5)
  np.testing.assert_allclose(ahead, expected["mtp1_logits"], rtol=0, atol=2e-5)
  assert config.n_mtp_layers == 1
  files = SafetensorsFolder(FOLDER)
  names = [name for name in expected if name.startswith("dequantised/")]
  assert len(names) == 3
  for name in names:
    tensor = name.removeprefix("dequantised/")
    scale = files.read(f"{tensor}_scale_inv")
    assert scale.size == 2  # ragged blocks
    values = dequantise_tensor(files.read(tensor), scale)
    np.testing.assert_array_equal(values, expected[name])


def test_an_answer_in_the_folders_chat_template(tmp_path, capsys, monkeypatch):
  """By the jobs import and generate, and by hand."""
  checkpoint = CheckpointConfig(path=str(FOLDER), dtype="float32")
  workdir = str(tmp_path / "imported")
  import_checkpoint(job_config("import", checkpoint=checkpoint), workdir)
  settings = GenerateConfig(
    prompts=("import",), max_new_tokens=6, checkpoint=workdir, chat="thinking"
  )
  jobs.generate(job_config("generate", generate=settings), str(tmp_path))
  written = (tmp_path / "samples" / "generated_0.txt").read_text("utf-8")
  assert written in capsys.readouterr().out

  models = []
  monkeypatch.setattr(
    jobs, "generate_text", lambda m, *_, **__: models.append(m) or [""]
  )
  settings = dataclasses.replace(settings, fp8=True)
  jobs.generate(job_config("generate", generate=settings), str(tmp_path))
  experts = models[0].moe_blocks.ffn.experts
  assert isinstance(experts.w13[...], Fp8Weight)
  assert experts.w13[...].gradient is None

  model, config = load(FOLDER, dtype=jnp.float32, progress=False)
  chat = ChatTokenizer.from_folder(FOLDER)
  ids = chat.encode([{"role": "user", "content": "import"}], open_thinking=True)
  run = dataclasses.replace(job_config("generate"), model=config)
  row = generate(model, run, [ids], max_new_tokens=6)[0]
  end = row.index(chat.tokenizer.eos) if chat.tokenizer.eos in row else len(row)
  assert end > 2
  assert chat.tokenizer.decode(row[:end]) in written


def test_a_workdir_without_a_template(tmp_path):
  config = job_config(
    "generate", generate=GenerateConfig(prompts=("a",), chat="thinking")
  )
  claim(config, tmp_path)
  shutil.copy(FOLDER / "tokenizer.json", tmp_path)
  with pytest.raises(ValueError, match=r"no chat template: put a chat_template\.jinja"):
    jobs.generate(config, str(tmp_path))
