"""Our parameters as a Hugging Face folder, for transformers, vLLM and SGLang.

The inverse of hf_import.py: one tensor per layer and expert, [out, in]; gate and up
projections apart; the copies of embedding and head in V3's MTP layers. In BF16 or FP32,
or in FP8 by 128x128 blocks as V3 (FP32 scales) or V3.1 (powers of two); norms, router,
embedding and head stay in BF16, the router's bias in FP32. Parameters that were
imported in FP8 and kept are written as they came.

With the layout of an imported checkpoint (`Layout.of`) the files come out as they were,
byte by byte, if the numbers are the same: same names and order, same headers, same
types. Without it, files are cut by size.

Left out: exports by several processes; arrays must be addressable here.
"""

import functools
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from deepseek_jax.io import safetensors_write as writing
from deepseek_jax.io.fp8_weights import dequantise_tensor
from deepseek_jax.io.hf_config import Quantization, write_config
from deepseek_jax.io.hf_names import HF_SCALE, AnyConfig, Place, hf_places
from deepseek_jax.io.safetensors import DTYPES, INDEX, SafetensorsFolder
from deepseek_jax.io.safetensors_write import Spec
from kernels_pallas.quantize import quantize_blocks

# What `dtype` may be, and what weights are stored as.
EXPORT_DTYPES = {
  "bfloat16": "BF16",
  "float32": "F32",
  "fp8": "F8_E4M3",  # FP32 scales, as V3
  "fp8_ue8m0": "F8_E4M3",  # powers of two, as V3.1
}
TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "generation_config.json",
  "chat_template.jinja",
)
_FILE_BYTES = 5e9


@dataclass(frozen=True)
class Layout:
  """How a checkpoint was laid out: enough to write it again byte by byte."""

  headers: dict[str, str]  # of each file
  index: str | None
  config: str

  @staticmethod
  def of(folder: SafetensorsFolder) -> "Layout":
    index = folder.path / INDEX
    return Layout(
      {name: file.header.decode() for name, file in folder.files.items()},
      index.read_text("utf-8") if index.exists() else None,
      (folder.path / "config.json").read_text("utf-8"),
    )

  def save(self, path: Path) -> None:
    path.write_text(json.dumps(asdict(self)), encoding="utf-8")

  @staticmethod
  def load(path: Path) -> "Layout":
    return Layout(**json.loads(path.read_text("utf-8")))

  def files(self) -> dict[str, tuple[bytes, list[Spec]]]:
    """Header and tensors, in the order of their data, of each file."""
    found = {}
    for name, header in self.headers.items():
      fields = json.loads(header)
      fields.pop("__metadata__", None)
      ordered = sorted(fields.items(), key=lambda item: item[1]["data_offsets"])
      specs = [Spec(n, f["dtype"], tuple(f["shape"])) for n, f in ordered]
      found[name] = header.encode(), specs
    return found


def export_hf(
  arrays: Mapping[str, Any],
  config: AnyConfig,
  folder: str | Path,
  dtype: str = "bfloat16",
  *,
  tokenizer: Path | None = None,
  layout: Layout | None = None,
  file_bytes: float = _FILE_BYTES,
  progress: bool = True,
) -> None:
  """Writes a folder, whole or not at all.

  Args:
    arrays: JAX or NumPy arrays by parameter path; FP8 ones with their scales.
    folder: must not exist.
    dtype: a key of EXPORT_DTYPES.
    tokenizer: a folder, whose tokenizer files are copied.
    layout: of the checkpoint that is to be written again; `dtype` and `file_bytes`
      then do not matter.

  Raises:
    ValueError: one line: an unknown dtype, a config or arrays that do not fit.
    SafetensorsError: the folder exists, or the disk is full.
  """
  if dtype not in EXPORT_DTYPES:
    raise ValueError(f"dtype={dtype!r} must be one of {', '.join(EXPORT_DTYPES)}")
  writer = _Tensors(arrays, hf_places(config), dtype)
  if layout:
    files = layout.files()
  else:
    cut = writing.cut_into_files(list(writer.specs()), file_bytes)
    files = {
      name: writing.make_header(group, writing.METADATA) for name, group in cut.items()
    }
  total = sum(spec.size for _, specs in files.values() for spec in specs)
  folder = Path(folder)
  with (
    writing.new_folder(folder, total) as part,
    tqdm(
      total=total, unit="B", unit_scale=True, desc=folder.name, disable=not progress
    ) as bar,
  ):
    for name, (header, specs) in files.items():
      writing.write_file(part / name, header, specs, writer.fetch, bar.update)
    if layout:
      (part / "config.json").write_text(layout.config, "utf-8")
      if layout.index:
        (part / INDEX).write_text(layout.index, "utf-8")
    else:
      if len(files) > 1:
        writing.write_index(part, {name: specs for name, (_, specs) in files.items()})
      (part / "config.json").write_text(_config_json(config, dtype), "utf-8")
    if tokenizer:
      copy_tokenizer(tokenizer, part)


def copy_tokenizer(source: Path, folder: Path) -> None:
  """Copies the tokenizer files that `source` has."""
  for name in TOKENIZER_FILES:
    if (source / name).is_file():
      shutil.copyfile(source / name, folder / name)


def _config_json(config: AnyConfig, dtype: str) -> str:
  quantization = None
  if EXPORT_DTYPES[dtype] == "F8_E4M3":
    quantization = Quantization("ue8m0" if dtype == "fp8_ue8m0" else "float32")
  content = write_config(
    config,
    quantization=quantization,
    dtype="float32" if dtype == "float32" else "bfloat16",
  )
  return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class _Tensors:
  """The tensors of a checkpoint, made from parameters when they are asked for."""

  arrays: Mapping[str, Any]
  places: dict[str, Place]
  dtype: str

  def specs(self) -> Iterable[Spec]:
    """Every tensor, in the order of the layers."""
    weights = EXPORT_DTYPES[self.dtype]
    for name, place in self.places.items():
      if weights == "F8_E4M3" and place.fp8:
        yield Spec(name, weights, place.shape)
        yield Spec(name + HF_SCALE, "F32", place.scale.shape)
      elif place.wide or weights == "F32":
        yield Spec(name, "F32", place.shape)
      else:
        yield Spec(name, "BF16", place.shape)

  def fetch(self, spec: Spec) -> np.ndarray:
    """The tensor of a spec, converted to its type.

    Raises:
      ValueError: a parameter is missing, or its shape is another.
    """
    weight = spec.name.removesuffix(HF_SCALE)
    place = self.places.get(weight)
    if place is None:
      raise ValueError(f"{spec.name} is no tensor of this model")
    kept = place.scale.path in self.arrays if place.ins else False
    if weight != spec.name:
      if kept:
        return self._raw(place.scale).astype(DTYPES[spec.dtype])
      return self._quantise(place)[1].astype(DTYPES[spec.dtype])
    if spec.dtype == "F8_E4M3":
      return self._raw(place) if kept else self._quantise(place)[0]
    tensor = self._raw(place)
    if kept:
      tensor = dequantise_tensor(tensor, self._raw(place.scale))
    return tensor.astype(DTYPES[spec.dtype], copy=False)

  def _quantise(self, place: Place) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales; computed for each of the two, which lie far apart in a file."""
    power = self.dtype == "fp8_ue8m0"
    codes, scale = _quantise(jnp.asarray(self._raw(place)), power)
    return np.asarray(codes), np.asarray(scale)

  def _raw(self, place: Place) -> np.ndarray:
    """The tensor as Hugging Face shapes it, in our dtype."""
    if place.path not in self.arrays:
      raise ValueError(f"{place.path} is missing among the parameters")
    body = take_part(self.arrays[place.path], place)
    if place.ins:
      axes = (*range(place.ins, body.ndim), *range(place.ins))
      body = _transposed(body, axes)
    return body.reshape(place.shape)


@functools.partial(jax.jit, static_argnums=1)
def _quantise(tensor: jax.Array, power_of_two: bool):
  if tensor.dtype != jnp.bfloat16:
    tensor = tensor.astype(jnp.float32)
  return quantize_blocks(tensor, power_of_two=power_of_two)[0]


def take_part(array: Any, place: Place) -> np.ndarray:
  """A place's part of a parameter in host memory, with the axes of `place.body`.

  Raises:
    ValueError: the parameter has another shape, or lies partly in other processes.
  """
  n = len(place.index)
  shape = (*array.shape[:n], *place.body[:-1])
  if array.shape[:-1] != shape or array.shape[-1] < place.start + place.body[-1]:
    raise ValueError(
      f"{place.path} is {list(array.shape)}, but the model's config asks for "
      f"{[*shape, place.start + place.body[-1]]}"
    )
  columns = slice(place.start, place.start + place.body[-1])
  if not isinstance(array, jax.Array):
    return np.asarray(array[place.index][..., columns])
  if not array.is_fully_addressable:
    raise ValueError(f"{place.path} lies partly in other processes: export from one")
  out = None
  for shard in array.addressable_shards:
    spans = [s.indices(size)[:2] for s, size in zip(shard.index, array.shape)]
    if any(not low <= i < high for i, (low, high) in zip(place.index, spans)):
      continue
    if shard.replica_id:
      continue
    local = tuple(i - low for i, (low, _) in zip(place.index, spans))
    data = _host_view(shard.data, local)
    if data.shape[:-1] == place.body[:-1] and data.shape[-1] == array.shape[-1]:
      return data[..., columns]
    if out is None:
      out = np.empty((*array.shape[n:],), array.dtype)
    out[tuple(slice(*span) for span in spans[n:])] = data
  assert out is not None
  return out[..., columns]


def _host_view(data: jax.Array, index: tuple[int, ...]) -> np.ndarray:
  """data[index] in host memory; on a CPU without a copy of the rest."""
  if next(iter(data.devices())).platform == "cpu":
    return np.asarray(data)[index]
  return np.asarray(data[index] if index else data)


def _transposed(body: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
  """A contiguous transpose; in strips, and as bytes, which is faster."""
  kind = {1: np.uint8, 2: np.uint16, 4: np.uint32}.get(body.dtype.itemsize)
  source = (body if kind is None else body.view(kind)).transpose(axes)
  out = np.empty(source.shape, source.dtype)
  step = max(1, 128 // math.prod(source.shape[1:-1] or (1,)))
  for start in range(0, len(source), step):
    out[start : start + step] = source[start : start + step]
  return out.view(body.dtype)
