"""Parameters for other JAX projects: an Orbax checkpoint of plain nested dicts.

    FOLDER/params/          Orbax PyTree: nested dicts of arrays, keys as in the names
    FOLDER/metadata.json    config, and of each array name, shape, dtype, axes, spec
                            (mesh axes of each dimension here; a list: several)

No type of Flax or of this project is in it, so Orbax and JAX alone restore it, on any
mesh. README.md, "Checkpoints", says how to compute with it. Stacked, a parameter holds
all layers of a kind on its first axis, as here; else there is one for each layer under
`layers.I`. FP8 weights have their scales beside them under NAME_scale.

Left out: exports by several processes.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from deepseek_jax.io.fp8_weights import quantise_arrays
from deepseek_jax.io.hf_export import copy_tokenizer
from deepseek_jax.io.hf_import import make_skeleton
from deepseek_jax.io.hf_names import SCALE, AnyConfig, hf_places
from deepseek_jax.io.plain import to_dict
from deepseek_jax.io.safetensors_write import new_folder
from deepseek_jax.model.layers import named_variables

FORMAT = "deepseek_jax parameters 1"
PLAIN_DTYPES = ("bfloat16", "float32", "fp8", "fp8_ue8m0")
_STACKS = ("dense_blocks", "moe_blocks", "blocks")
_UNITS = (
  "weight = code * scale in FP32; a scale stands for 128 x 128 values, rows x columns "
  "of the weight as a matrix [in, out] whose heads are joined; blocks at the edges are "
  "smaller. The two halves of w13 (gate, up) have blocks of their own."
)
_AXES = {  # of one layer; `out` and `in` of a matrix in their order
  "embed.weight": "vocab dim",
  "head.weight": "dim vocab",
  "lm_head.weight": "dim vocab",
  "attn.wq": "dim head query",
  "attn.wq_a": "dim query_latent",
  "attn.wq_b": "query_latent head query",
  "attn.wkv_a": "dim latent",
  "attn.wkv_b": "kv_latent head nope_value",
  "attn.wk": "dim head key",
  "attn.wv": "dim head value",
  "attn.wo": "head value dim",
  "attn.bq": "head query",
  "attn.bk": "head key",
  "attn.bv": "head value",
  "ffn.w13": "dim gate_up",
  "ffn.w2": "hidden dim",
  "ffn.shared.w13": "dim gate_up",
  "ffn.shared.w2": "hidden dim",
  "ffn.router.weight": "dim expert",
  "ffn.router.bias": "expert",
  "ffn.experts.w13": "expert dim gate_up",
  "ffn.experts.w2": "expert hidden dim",
  "eh_proj": "embedding_state dim",
}


def export_plain(
  arrays: Mapping[str, jax.Array],
  config: AnyConfig,
  folder: str | Path,
  dtype: str = "bfloat16",
  *,
  stacked: bool = True,
  tokenizer: Path | None = None,
) -> None:
  """Writes the folder, whole or not at all.

  Args:
    arrays: by path, in the type they shall have; FP8 ones with their scales. With an
      FP8 `dtype` the weights of linear layers are quantised.
    dtype: bfloat16, float32, fp8 or fp8_ue8m0.

  Raises:
    ValueError: an unknown dtype.
    SafetensorsError: the folder exists, or the disk is full.
  """
  if dtype not in PLAIN_DTYPES:
    raise ValueError(
      f"dtype={dtype!r} must be one of {', '.join(PLAIN_DTYPES)} in this format"
    )
  if dtype.startswith("fp8"):
    places = [place for place in hf_places(config).values() if not place.copy]
    arrays = quantise_arrays(arrays, places, dtype == "fp8_ue8m0")
  parameters = dict(_entries(arrays, config, stacked))
  metadata = {
    "format": FORMAT,
    "model": to_dict(config),
    "stacked": stacked,
    "dtype": dtype,
    "parameters": {name: about for name, (_, about) in parameters.items()},
    "scales": {"block": [128, 128], "units": _UNITS} if "fp8" in dtype else None,
  }
  tree = nest({name: array for name, (array, _) in parameters.items()})
  needed = sum(array.nbytes for array, _ in parameters.values())
  with new_folder(Path(folder), needed) as part:
    save_tree((part / "params").absolute(), tree)
    text = json.dumps(metadata, indent=1, ensure_ascii=False)
    (part / "metadata.json").write_text(text + "\n", "utf-8")
    if tokenizer:
      copy_tokenizer(tokenizer, part)


def save_tree(path: Path, tree: dict[str, Any]) -> None:
  """Writes nested dicts of arrays with Orbax, and waits until they are on the disk."""
  with ocp.StandardCheckpointer() as writer:
    writer.save(path, tree)
    writer.wait_until_finished()


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """{'a.b': 1} as {'a': {'b': 1}}."""
  nested: dict[str, Any] = {}
  for name, value in flat.items():
    *above, last = name.split(".")
    inner = nested
    for key in above:
      inner = inner.setdefault(key, {})
    inner[last] = value
  return nested


def _entries(
  arrays: Mapping[str, jax.Array], config: AnyConfig, stacked: bool
) -> Iterator[tuple[str, tuple[jax.Array, dict[str, Any]]]]:
  """Each array under its name in the export, with what the metadata say of it."""
  variables = named_variables(make_skeleton(config))
  dense = getattr(config, "n_dense_layers", 0)
  for path, array in arrays.items():
    weight = path.removesuffix(SCALE)
    name = weight + "_scale" if weight != path else path
    stack, _, rest = name.partition(".")
    layered = stack in _STACKS
    axes = _axes(weight, layered, array.ndim, scale=weight != path)
    spec = [*variables[weight].get_metadata()["spec"]]
    spec = (spec + [None] * array.ndim)[: array.ndim]
    if layered and not stacked:
      first = dense if stack == "moe_blocks" else 0
      for i in range(len(array)):
        about = _about(array[i], axes[1:], spec[1:])
        yield f"layers.{first + i}.{rest}", (array[i], about)
    else:
      yield name, (array, _about(array, axes, spec))


def _axes(path: str, layered: bool, ndim: int, scale: bool) -> list[str]:
  """Names of the axes of a parameter."""
  tail = path.partition(".")[2] if layered else path
  if path.startswith("mtp."):
    tail = path.split(".", 2)[2].removeprefix("block.")
  named = _AXES.get(tail, "dim").split()
  if scale:
    experts = ["expert"] if tail.startswith("ffn.experts") else []
    named = [*experts, "in/128", "out/128"]
  axes = ["layer", *named] if layered else named
  assert len(axes) == ndim, (path, axes, ndim)
  return axes


def _about(array: jax.Array, axes: list[str], spec: list[Any]) -> dict[str, Any]:
  shape = list(array.shape)
  return {"shape": shape, "dtype": str(array.dtype), "axes": axes, "spec": spec}
