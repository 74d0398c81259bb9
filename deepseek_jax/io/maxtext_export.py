"""Parameters under MaxText's names, for its DeepSeek models with scanned layers.

    FOLDER/0/items/    Orbax PyTree {"params": {"params": ...}}

which `load_parameters_path=FOLDER/0/items` of MaxText reads. Names and layout are those
of its conversion script for DeepSeek (AI-Hypercomputer/maxtext, convert_deepseek_family
_ckpt.py): the layer axis is second, experts come before it, gate and up projections are
apart, heads are split as here. MaxText has one MTP depth and norms it with the main
model's final norm, so `shared_head.norm` has no place there. MaxText itself is not
among our dependencies; names are tested against that script's table.

Left out: unscanned layers, FP8 (MaxText reads BF16), MLA-free models.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.io.hf_export import copy_tokenizer
from deepseek_jax.io.hf_names import AnyConfig
from deepseek_jax.io.plain_export import nest, save_tree
from deepseek_jax.io.safetensors_write import new_folder

log = logging.getLogger("deepseek_jax")

_NORMS = {
  "attn_norm": "pre_self_attention_layer_norm",
  "ffn_norm": "post_self_attention_layer_norm",
  "attn.q_norm": "self_attention.q_norm",
  "attn.kv_norm": "self_attention.kv_norm",
}
_ATTENTION = {
  "wq": "query",
  "wq_a": "wq_a",
  "wq_b": "wq_b",
  "wkv_a": "wkv_a",
  "wkv_b": "wkv_b",
  "wo": "out",
}
_MOE = "DeepSeekMoeBlock_0"
_STACKS = {"dense_blocks": "decoder.dense_layers", "moe_blocks": "decoder.moe_layers"}
_MTP = "mtp_block.mtp_layer_1"
_MTP_BLOCK = f"{_MTP}.mtp_1_transformer_layer"


def export_maxtext(
  arrays: Mapping[str, jax.Array],
  config: AnyConfig,
  folder: str | Path,
  dtype: str = "bfloat16",
  *,
  tokenizer: Path | None = None,
) -> None:
  """Writes the folder, whole or not at all.

  Raises:
    ValueError: a model or a type that MaxText does not have.
    SafetensorsError: the folder exists, or the disk is full.
  """
  if dtype not in ("bfloat16", "float32"):
    raise ValueError(f"dtype={dtype!r} must be bfloat16 or float32 in MaxText's format")
  flat = maxtext_arrays(arrays, config)
  flat = {name: array.astype(dtype) for name, array in flat.items()}
  needed = sum(array.nbytes for array in flat.values())
  with new_folder(Path(folder), needed) as part:
    (part / "0").mkdir()
    tree = {"params": {"params": nest(flat)}}
    save_tree((part / "0" / "items").absolute(), tree)
    if tokenizer:
      copy_tokenizer(tokenizer, part)


def maxtext_arrays(
  arrays: Mapping[str, jax.Array], config: AnyConfig
) -> dict[str, jax.Array]:
  """Our parameters by MaxText's dotted names, in its layout.

  Raises:
    ValueError: a model that MaxText does not have.
  """
  if not isinstance(config, ModelConfig) or not config.kv_lora_rank:
    raise ValueError(f"{config.name} has no latent attention: export it as hf or orbax")
  if config.n_mtp_layers > 1:
    raise ValueError(
      f"model.n_mtp_layers={config.n_mtp_layers}: MaxText's table has one MTP layer"
    )
  found = {}
  for path, array in arrays.items():
    stack, _, rest = path.partition(".")
    if stack in _STACKS:
      for name, part in _renamed(rest, array):
        found[f"{_STACKS[stack]}.{name}"] = jnp.moveaxis(part, 0, 1)
    elif path.startswith("mtp.0.block."):
      for name, part in _renamed(path.removeprefix("mtp.0.block."), array):
        found[f"{_MTP_BLOCK}.{name}"] = part
    elif path == "mtp.0.norm.weight":
      log.warning("MaxText norms MTP with the final norm: %s is left out", path)
    else:
      found[_SINGLE[path]] = array
  return found


_SINGLE = {
  "embed.weight": "token_embedder.embedding",
  "norm.weight": "decoder.decoder_norm.scale",
  "head.weight": "decoder.logits_dense.kernel",
  "mtp.0.enorm.weight": f"{_MTP}.mtp_1_embedding_norm.scale",
  "mtp.0.hnorm.weight": f"{_MTP}.mtp_1_hidden_state_norm.scale",
  "mtp.0.eh_proj": f"{_MTP}.mtp_1_projection.kernel",
}


def _renamed(path: str, array: jax.Array) -> Iterator[tuple[str, jax.Array]]:
  """A parameter of a block under MaxText's name, gate and up apart."""
  head, _, last = path.rpartition(".")
  if head in _NORMS:
    yield f"{_NORMS[head]}.scale", array
  elif head == "attn":
    yield f"self_attention.{_ATTENTION[last]}.kernel", array
  elif head == "ffn.router":
    name = "kernel" if last == "weight" else "bias"
    yield f"{_MOE}.MoeBlock_0.gate.{name}", array
  else:
    where, kernel = {
      "ffn": ("mlp.", ".kernel"),
      "ffn.shared": (f"{_MOE}.shared_experts.", ".kernel"),
      "ffn.experts": (f"{_MOE}.MoeBlock_0.", ""),
    }[head]
    if last == "w2":
      yield f"{where}wo{kernel}", array
    else:
      gate, up = jnp.split(array, 2, axis=-1)
      yield f"{where}wi_0{kernel}", gate
      yield f"{where}wi_1{kernel}", up
