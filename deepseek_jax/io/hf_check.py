"""A Hugging Face folder against its config.json, before any weight is read.

Every tensor that the config asks for is there, with its shape and a type that we read;
nothing else is; FP8 weights have scales, which are numbers; and the copies of embedding
and head in V3's MTP layers are copies. Headers are enough for all but the last two.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.io.hf_config import Quantization, read_config
from deepseek_jax.io.hf_names import (
  COMPUTED,
  HF_SCALE,
  AnyConfig,
  Place,
  hf_places,
)
from deepseek_jax.io.safetensors import SafetensorsError, SafetensorsFolder

log = logging.getLogger("deepseek_jax")

FP8 = "F8_E4M3"
_FLOATS = ("BF16", "F16", "F32", "F64")
_SCALES = ("F32", "BF16", "F8_E8M0")
_CHUNK = 1 << 24  # bytes compared at once


@dataclass(frozen=True)
class Source:
  """A checkpoint whose names, shapes and types are those of its config."""

  folder: SafetensorsFolder
  config: AnyConfig
  quantization: Quantization | None
  places: dict[str, Place]  # of every weight

  def is_fp8(self, name: str) -> bool:
    return self.folder.entry(name).dtype == FP8

  def read_scale(self, name: str) -> np.ndarray:
    """The scales of the FP8 weight `name`, FP32 [ceil(out/128), ceil(in/128)].

    Raises:
      SafetensorsError: one is not a finite positive number or zero.
    """
    scale = self.folder.read(name + HF_SCALE).astype(np.float32)
    if not np.all(np.isfinite(scale) & (scale >= 0)):
      where = self.folder.file_of(name + HF_SCALE).path
      bad = scale[~(np.isfinite(scale) & (scale >= 0))][0]
      raise SafetensorsError(f"{where}: {name}{HF_SCALE} holds {bad}: no scale")
    return scale


def open_checkpoint(
  folder: str | Path, config: AnyConfig | None = None, max_seq_len: int | None = None
) -> Source:
  """Opens a folder and checks it.

  A folder whose config speaks of MTP layers, but which holds none of their tensors (as
  written by transformers), is read without them, with a warning. The copies of
  embedding and head in MTP layers may be missing.

  Args:
    config: in place of the folder's config.json.
    max_seq_len: in place of the config's.

  Raises:
    FileNotFoundError: no folder, no config.json, no safetensors.
    SafetensorsError, ValueError: one line that names file and tensor.
  """
  quantization = None
  if config is None:
    if not Path(folder).is_dir():
      raise FileNotFoundError(f"{folder} is no folder: name one with a checkpoint")
    config, quantization = read_config(folder)
  if max_seq_len:
    config = replace(config, max_seq_len=max_seq_len)
  files = SafetensorsFolder(folder)
  config = _without_absent_mtp(config, files)
  places = hf_places(config)
  source = Source(files, config, quantization, places)
  _check_names(source)
  for name in [n for n, place in places.items() if n not in files and place.copy]:
    del places[name]
  for name, place in source.places.items():
    _check_tensor(source, name, place)
  for name, place in source.places.items():
    if place.copy:
      _check_copy(source, name, place)
  return source


def _without_absent_mtp(config: AnyConfig, files: SafetensorsFolder) -> AnyConfig:
  if not isinstance(config, ModelConfig) or not config.n_mtp_layers:
    return config
  first = f"model.layers.{config.n_layers}."
  if any(name.startswith(first) for name in files.where):
    return config
  log.warning("%s holds no MTP layer: the model is read without", files.path)
  return replace(config, n_mtp_layers=0)


def _check_names(source: Source) -> None:
  folder, places = source.folder, source.places
  for name, file in folder.where.items():
    weight = name.removesuffix(HF_SCALE)
    if name in places or weight in places or name.endswith(COMPUTED):
      continue
    raise SafetensorsError(
      f"{folder.path / file}: {ascii(name)[1:-1][:200]} is no tensor of the model of "
      f"config.json ({source.config.n_layers} layers): one of the two is another's"
    )
  for name, place in places.items():
    if name not in folder and not place.copy:
      raise SafetensorsError(
        f"{folder.path}: {name} {list(place.shape)} is missing, which the model of "
        f"config.json needs ({source.config.n_layers} layers)"
      )


def _check_tensor(source: Source, name: str, place: Place) -> None:
  folder, entry = source.folder, source.folder.entry(name)
  where = f"{folder.file_of(name).path}: {name}"
  if entry.shape != place.shape:
    raise SafetensorsError(
      f"{where} is {list(entry.shape)}, but config.json asks for {list(place.shape)}"
    )
  scaled = name + HF_SCALE in folder
  if entry.dtype == FP8 and place.ins and not place.copy:
    if not scaled:
      raise SafetensorsError(f"{where} is FP8, but {name}{HF_SCALE} is missing")
    scale = folder.entry(name + HF_SCALE)
    if scale.shape != place.scale.shape or scale.dtype not in _SCALES:
      raise SafetensorsError(
        f"{where}{HF_SCALE} is {scale.dtype}{list(scale.shape)}, but one FP32 number "
        f"for each 128x128 block is {list(place.scale.shape)}"
      )
    source.read_scale(name)
  elif entry.dtype not in _FLOATS:
    raise SafetensorsError(
      f"{where} has dtype {entry.dtype}: weights are {', '.join(_FLOATS)}"
      f"{' or ' + FP8 if place.ins else ''}"
    )
  elif scaled:
    raise SafetensorsError(f"{where} is {entry.dtype}, yet {name}{HF_SCALE} is there")


def _check_copy(source: Source, name: str, place: Place) -> None:
  """Compares the bytes of a copy with those of its original."""
  folder = source.folder
  original = next(
    other
    for other, its in source.places.items()
    if its.path == place.path and not its.copy
  )
  where = f"{folder.file_of(name).path}: {name}"
  if folder.entry(name).dtype != folder.entry(original).dtype:
    raise SafetensorsError(f"{where} has another dtype than {original}, its original")
  one, other = (
    folder.read(tensor).reshape(-1).view(np.uint8) for tensor in (name, original)
  )
  for start in range(0, one.size, _CHUNK):
    part = slice(start, start + _CHUNK)
    if not np.array_equal(one[part], other[part]):
      raise SafetensorsError(
        f"{where} differs from {original}, of which MTP layers hold copies only"
      )
    folder.release(name)
    folder.release(original)
