"""The jobs that bring checkpoints in and take them out."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import Config
from deepseek_jax.io import workdir
from deepseek_jax.io.checkpoint import check_space, tree_bytes
from deepseek_jax.io.hf_check import Source, open_checkpoint
from deepseek_jax.io.hf_export import Layout, copy_tokenizer, export_hf
from deepseek_jax.io.hf_import import (
  compute_targets,
  fp8_targets,
  load_arrays,
  make_skeleton,
)
from deepseek_jax.io.maxtext_export import export_maxtext
from deepseek_jax.io.plain_export import export_plain
from deepseek_jax.io.weights import LAYOUT, restore_weights, save_imported
from deepseek_jax.mesh import make_mesh

log = logging.getLogger("deepseek_jax")


def import_checkpoint(
  config: Config, folder: str, devices: Sequence[Any] | None = None
) -> None:
  """Reads a Hugging Face folder into a workdir that other jobs start from."""
  if not config.checkpoint.path:
    raise ValueError(
      "checkpoint.path is empty: name a Hugging Face folder with "
      "--config.checkpoint.path=FOLDER"
    )
  source = open_checkpoint(config.checkpoint.path)
  config = _config_of_import(config, source)
  target = Path(folder)
  workdir.check(config, target)
  if any(path.name.isdigit() for path in target.glob("checkpoints/*")):
    log.info("%s holds this checkpoint already", target)
    return
  mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
  skeleton = make_skeleton(source.config)
  if config.checkpoint.dtype == "fp8":
    targets = fp8_targets(source, mesh)
  else:
    targets = compute_targets(skeleton, mesh, jnp.dtype(config.checkpoint.dtype))
  check_space(target / "checkpoints", tree_bytes(targets), keep=0)
  arrays = load_arrays(source, targets)
  if jax.process_index() == 0:
    workdir.claim(config, target)
    Layout.of(source.folder).save(target / LAYOUT)
    copy_tokenizer(source.folder.path, target)
  save_imported(target, arrays, skeleton, {"imported": str(source.folder.path)})
  if jax.process_index() == 0:
    print(f"checkpoint: {target / 'checkpoints' / '0'}")
    if not (target / "tokenizer.json").exists():
      log.warning("%s has no tokenizer.json, which text needs", source.folder.path)


def _config_of_import(config: Config, source: Source) -> Config:
  """The config of a workdir that holds `source`."""
  dtype = config.checkpoint.dtype
  if dtype not in ("bfloat16", "float32", "fp8"):
    raise ValueError(
      f"checkpoint.dtype={dtype} cannot be imported: use bfloat16, float32 or fp8"
    )
  if dtype == "fp8" and not any(source.is_fp8(name) for name in source.places):
    raise ValueError(
      f"checkpoint.dtype=fp8, but {source.folder.path} holds no FP8 weights: use "
      "bfloat16"
    )
  train = dataclasses.replace(
    config.train, seq_len=min(config.train.seq_len, source.config.max_seq_len)
  )
  return dataclasses.replace(
    config,
    model=source.config,
    train=train,
    precision="fp32" if dtype == "float32" else "bf16",
  )


def export_checkpoint(
  config: Config, folder: str, devices: Sequence[Any] | None = None
) -> None:
  """Writes the newest weights of a workdir for others."""
  source = Path(config.generate.checkpoint or folder)
  options = config.checkpoint
  out = Path(options.path or Path(folder) / f"exported_{options.format}")
  trained = workdir.read(source)
  mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
  skeleton = make_skeleton(trained.model)
  dtype = jnp.float32 if options.dtype == "float32" else jnp.bfloat16
  layout = None
  if options.dtype == "imported":
    if options.format != "hf" or not (source / LAYOUT).exists():
      raise ValueError(
        "checkpoint.dtype=imported needs checkpoint.format=hf and the workdir of an "
        f"import: {source} is none"
      )
    layout = Layout.load(source / LAYOUT)
    dtype = jnp.float32 if trained.precision == "fp32" else jnp.bfloat16
  number, arrays = restore_weights(
    source,
    skeleton,
    compute_targets(skeleton, mesh, dtype),
    average=options.average,
    keep_fp8=options.dtype in ("fp8", "imported"),
  )
  match options.format:
    case "hf":
      export_hf(
        arrays,
        trained.model,
        out,
        "bfloat16" if options.dtype == "imported" else options.dtype,
        tokenizer=source,
        layout=layout,
        file_bytes=options.file_gb * 1e9,
      )
    case "orbax":
      export_plain(
        arrays,
        trained.model,
        out,
        options.dtype,
        stacked=options.stacked,
        tokenizer=source,
      )
    case "maxtext":
      export_maxtext(arrays, trained.model, out, options.dtype, tokenizer=source)
  print(json.dumps({"step": number, "average": options.average}))
  print(f"exported: {out}")
