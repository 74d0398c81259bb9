"""One table: where each tensor of a Hugging Face checkpoint lies in our parameters.

Hugging Face stores a tensor per layer and expert, weights as [out, in]; we stack layers
and experts, put `in` first, split `out` or `in` into heads, and keep gate and up
projections side by side. The table is computed from a config alone, so that names and
shapes can be checked before anything is read. Rotary dimensions keep the order of the
released weights on both sides.

FP8 checkpoints hold, beside each weight of a linear layer, `NAME_scale_inv`: FP32
[ceil(out/128), ceil(in/128)], which multiplies the codes of its 128x128 block. Ours
stands under PATH + SCALE and is transposed like its weight, but heads are not split
from it; scales of gate and up lie side by side.

The copies of embedding and head in V3's MTP layers have a place but no parameter of
their own. Sources: the released checkpoints' indices and modeling files.

Shape letters: V vocabulary, D model, H heads, G key and value heads, Q query latent, C
key-value latent, K query width, R rope, N nope, U value width, F hidden, E experts.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from deepseek_jax.config import ModelConfig
from deepseek_jax.dense_config import DenseConfig

SCALE = ".scale"  # behind our path of an FP8 weight
HF_SCALE = "_scale_inv"  # behind Hugging Face's name of it
TILE = 128
# Values that some checkpoints hold and every reader computes for itself.
COMPUTED = ".rotary_emb.inv_freq"

AnyConfig = ModelConfig | DenseConfig


@dataclass(frozen=True, slots=True)
class Place:
  """Where one tensor of a checkpoint lies with us.

  A tensor [out, in] becomes ours by transposition: `body`, ours without its stacked
  axes, is `ins` axes that make up `in` and then those that make up `out`. A tensor of
  one axis has `ins=0` and is reshaped only.
  """

  path: str  # our parameter
  index: tuple[int, ...]  # along its stacked axes: layer, expert
  shape: tuple[int, ...]  # Hugging Face's
  body: tuple[int, ...]  # ours, this tensor's part of it
  ins: int  # leading axes of `body` that are `in`; 0: not transposed
  start: int = 0  # along our last axis, where this tensor begins
  fp8: bool = False  # whether V3's releases have it in FP8
  wide: bool = False  # whether releases have it in FP32
  copy: bool = False  # a copy of what another name holds

  @property
  def scale(self) -> "Place":
    """Where the scales of an FP8 weight lie."""
    out, in_ = (math.ceil(n / TILE) for n in self.shape)
    start = math.ceil(self.start / TILE)
    path = self.path + SCALE
    return Place(path, self.index, (out, in_), (in_, out), 1, start, wide=True)


def hf_places(config: AnyConfig) -> dict[str, Place]:
  """Every tensor of a BF16 checkpoint, by its name, in the order of the layers.

  Raises:
    ValueError: the config has no counterpart among Hugging Face's.
  """
  if isinstance(config, DenseConfig):
    return dict(_dense(config))
  if config.mtp_concat != "embedding_first":
    raise ValueError(
      f"model.mtp_concat={config.mtp_concat} has no place in Hugging Face's layout: "
      "released weights have embedding_first"
    )
  return dict(_latent(config))


def hf_names(config: AnyConfig, fp8: bool) -> list[str]:
  """Every name of a checkpoint; with `fp8` also those of the scales."""
  names = []
  for name, place in hf_places(config).items():
    names.append(name)
    if fp8 and place.fp8:
      names.append(name + HF_SCALE)
  return names


def our_shapes(places: Iterable[Place]) -> dict[str, tuple[int, ...]]:
  """The shape of each of our parameters, from the places of all its parts."""
  found: dict[str, tuple[int, ...]] = {}
  for place in places:
    if place.copy:
      continue
    stacked = tuple(i + 1 for i in place.index)
    *most, last = place.body
    shape = (*stacked, *most, place.start + last)
    known = found.get(place.path, shape)
    found[place.path] = tuple(map(max, known, shape))
  return found


def _latent(c: ModelConfig) -> Iterator[tuple[str, Place]]:
  """DeepSeek's models: dense layers, layers with experts, MTP layers."""
  v, d = c.vocab_size, c.dim
  yield "model.embed_tokens.weight", _plain("embed.weight", (v, d))
  for layer in range(c.n_layers):
    dense = layer < c.n_dense_layers
    stack = "dense_blocks" if dense else "moe_blocks"
    index = layer if dense else layer - c.n_dense_layers
    yield from _block(c, f"model.layers.{layer}", stack, (index,), dense)
  for depth in range(c.n_mtp_layers):
    hf, ours = f"model.layers.{c.n_layers + depth}", f"mtp.{depth}"
    yield f"{hf}.embed_tokens.weight", _plain("embed.weight", (v, d), copy=True)
    yield f"{hf}.enorm.weight", _gain(f"{ours}.enorm", d)
    yield f"{hf}.hnorm.weight", _gain(f"{ours}.hnorm", d)
    yield f"{hf}.eh_proj.weight", _matrix(f"{ours}.eh_proj", (2 * d,), (d,))
    yield from _block(c, hf, f"{ours}.block", (), False)
    yield f"{hf}.shared_head.norm.weight", _gain(f"{ours}.norm", d)
    head = _matrix("head.weight", (d,), (v,), copy=True)
    yield f"{hf}.shared_head.head.weight", head
  yield "model.norm.weight", _gain("norm", d)
  yield "lm_head.weight", _matrix("head.weight", (d,), (v,))


def _block(
  c: ModelConfig, hf: str, ours: str, index: tuple[int, ...], dense: bool
) -> Iterator[tuple[str, Place]]:
  for name, place in _attention(c, f"{ours}.attn", index):
    yield f"{hf}.self_attn.{name}", place
  if dense:
    yield from _swiglu(f"{hf}.mlp", f"{ours}.ffn", index, c.dim, c.inter_dim)
  else:
    yield from _experts(c, f"{hf}.mlp", f"{ours}.ffn", index)
  yield f"{hf}.input_layernorm.weight", _gain(f"{ours}.attn_norm", c.dim, index)
  after = _gain(f"{ours}.ffn_norm", c.dim, index)
  yield f"{hf}.post_attention_layernorm.weight", after


def _attention(
  c: ModelConfig, ours: str, index: tuple[int, ...]
) -> Iterator[tuple[str, Place]]:
  d, h, u = (c.dim,), c.n_heads, c.v_head_dim
  queries = (h, c.qk_head_dim)

  def linear(name, ins, outs):
    return _matrix(f"{ours}.{name}", ins, outs, index, fp8=True)

  if not c.kv_lora_rank:
    yield "q_proj.weight", linear("wq", d, queries)
    yield "k_proj.weight", linear("wk", d, queries)
    yield "v_proj.weight", linear("wv", d, (h, u))
    yield "o_proj.weight", linear("wo", (h, u), d)
    return
  if c.q_lora_rank:
    yield "q_a_proj.weight", linear("wq_a", d, (c.q_lora_rank,))
    yield "q_a_layernorm.weight", _gain(f"{ours}.q_norm", c.q_lora_rank, index)
    yield "q_b_proj.weight", linear("wq_b", (c.q_lora_rank,), queries)
  else:
    yield "q_proj.weight", linear("wq", d, queries)
  yield "kv_a_proj_with_mqa.weight", linear("wkv_a", d, (c.cache_dim,))
  yield "kv_a_layernorm.weight", _gain(f"{ours}.kv_norm", c.kv_lora_rank, index)
  up = linear("wkv_b", (c.kv_lora_rank,), (h, c.qk_nope_head_dim + u))
  yield "kv_b_proj.weight", up
  yield "o_proj.weight", linear("wo", (h, u), d)


def _experts(
  c: ModelConfig, hf: str, ours: str, index: tuple[int, ...]
) -> Iterator[tuple[str, Place]]:
  d, e = c.dim, c.n_routed_experts
  yield f"{hf}.gate.weight", _matrix(f"{ours}.router.weight", (d,), (e,), index)
  if c.use_router_bias:
    bias = Place(f"{ours}.router.bias", index, (e,), (e,), 0, wide=True)
    yield f"{hf}.gate.e_score_correction_bias", bias
  for i in range(e):
    one = (*index, i)
    yield from _swiglu(f"{hf}.experts.{i}", f"{ours}.experts", one, d, c.moe_inter_dim)
  if c.n_shared_experts:
    width = c.n_shared_experts * c.moe_inter_dim
    yield from _swiglu(f"{hf}.shared_experts", f"{ours}.shared", index, d, width)


def _dense(c: DenseConfig) -> Iterator[tuple[str, Place]]:
  """Qwen2 and Llama."""
  d, h, g, k = (c.dim,), c.n_heads, c.n_kv_heads, c.head_dim
  embedding = _plain("embed.weight", (c.vocab_size, c.dim))
  yield "model.embed_tokens.weight", embedding
  for layer in range(c.n_layers):
    hf, index = f"model.layers.{layer}", (layer,)
    for letter, heads in (("q", h), ("k", g), ("v", g)):
      weight = _matrix(f"blocks.attn.w{letter}", d, (heads, k), index)
      yield f"{hf}.self_attn.{letter}_proj.weight", weight
      if c.qkv_bias:
        path, width = f"blocks.attn.b{letter}", (heads * k,)
        bias = Place(path, index, width, (heads, k), 0)
        yield f"{hf}.self_attn.{letter}_proj.bias", bias
    out = _matrix("blocks.attn.wo", (h, k), d, index)
    yield f"{hf}.self_attn.o_proj.weight", out
    yield from _swiglu(f"{hf}.mlp", "blocks.ffn", index, c.dim, c.inter_dim)
    before = _gain("blocks.attn_norm", c.dim, index)
    yield f"{hf}.input_layernorm.weight", before
    after = _gain("blocks.ffn_norm", c.dim, index)
    yield f"{hf}.post_attention_layernorm.weight", after
  yield "model.norm.weight", _gain("norm", c.dim)
  if not c.tie_embeddings:
    yield "lm_head.weight", _matrix("lm_head.weight", d, (c.vocab_size,))


def _swiglu(
  hf: str, ours: str, index: tuple[int, ...], dim: int, hidden: int
) -> Iterator[tuple[str, Place]]:
  """Gate and up, side by side with us, and down."""
  d, f = (dim,), (hidden,)
  w13, w2 = f"{ours}.w13", f"{ours}.w2"
  yield f"{hf}.gate_proj.weight", _matrix(w13, d, f, index, fp8=True)
  yield f"{hf}.up_proj.weight", _matrix(w13, d, f, index, start=hidden, fp8=True)
  yield f"{hf}.down_proj.weight", _matrix(w2, f, d, index, fp8=True)


def _matrix(
  path: str,
  ins: tuple[int, ...],
  outs: tuple[int, ...],
  index: tuple[int, ...] = (),
  **flags,
) -> Place:
  shape = (math.prod(outs), math.prod(ins))
  return Place(path, index, shape, (*ins, *outs), len(ins), **flags)


def _plain(path: str, shape: tuple[int, ...], copy: bool = False) -> Place:
  return Place(path, (), shape, shape, 0, copy=copy)


def _gain(module: str, dim: int, index: tuple[int, ...] = ()) -> Place:
  return Place(f"{module}.weight", index, (dim,), (dim,), 0)
