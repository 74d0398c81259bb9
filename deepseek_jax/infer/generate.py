"""Completing prompts: naive prefill, then absorbed decoding on the latent cache.

DeepSeek-V2 report, section 2.1 (the cache and the absorbed form). One program reads
all prompts and decodes in a `while_loop` until every row has ended. Prompts are padded
on the right and each row keeps its own position. Lengths are rounded up, so that few
programs are compiled.

On a mesh the batch is split over the data axes and experts over theirs. Prompts reach
them as training does, without a bound, and later tokens by fixed slots (see
parallel/decode_dispatch.py), so nothing overflows. What moves here besides the experts'
tokens: one integer a token, so that all ranks stop together, and the result at the end.

Left out: batches that change while they run, speculation with MTP.

Shape suffixes: B batch, T padded prompt, S cache, V vocabulary, W new tokens.
"""

import functools
import math
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import Config, GenerateConfig
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.infer.sampling import next_tokens, row_keys
from deepseek_jax.mesh import BATCH_AXES, PIPELINE, split_axes
from deepseek_jax.model.dense import DenseTransformer
from deepseek_jax.model.layers import map_variables
from deepseek_jax.model.moe import Execution
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.processes import compile_together

LENGTH_MULTIPLE = 64  # of padded prompts, caches and outputs
STOPS_MULTIPLE = 8
NOTHING = -1  # where a row has no token: ids are not negative

Model = Transformer | DenseTransformer


def generate_text(
  model: Model,
  config: Config,
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  settings: GenerateConfig,
  template: ChatTemplate | None = None,
  mesh: Mesh | None = None,
  key: jax.Array | None = None,
) -> list[str]:
  """Completes texts; returns what follows each, without the token that ended it.

  Every prompt starts a document: it is put behind the tokenizer's `bos`, or, with
  `settings.chat`, it is a user's message in the chat template. Names of special tokens
  in it become these tokens, so fill-in-the-middle prompts are written out: fim_begin,
  prefix, fim_hole, suffix, fim_end.

  Args:
    settings: `prompts` and `checkpoint` of it are not used.
    template: the tokenizer's, needed where `settings.chat` is not off.

  Raises:
    ValueError: as `generate`, or a stop text that is not one token.
  """
  stops = {tokenizer.eos, *(tokenizer.token_id(text) for text in settings.stop)}
  if settings.chat == "off":
    encoded = [_encode(tokenizer, text) for text in prompts]
  elif template is None:
    raise ValueError(f"generate.chat={settings.chat} needs a chat template")
  else:
    thinking = settings.chat == "thinking"
    chats = [[{"role": "user", "content": text}] for text in prompts]
    encoded = [
      tokenizer.encode(template.render(chat, open_thinking=thinking)) for chat in chats
    ]
  rows = generate(
    model,
    config,
    encoded,
    max_new_tokens=settings.max_new_tokens,
    temperature=settings.temperature,
    top_p=settings.top_p,
    stop_ids=stops,
    mesh=mesh,
    key=key,
  )
  kept = [row[:-1] if row[-1] in stops else row for row in rows]
  return [tokenizer.decode(row) for row in kept]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
  ids = tokenizer.encode(text)
  if tokenizer.bos is None:
    return ids or [tokenizer.eos]  # the end of one document begins the next
  return ids if ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids]


def generate(
  model: Model,
  config: Config,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  temperature: float = 0.0,
  top_p: float = 1.0,
  stop_ids: Collection[int] = (),
  bos: int | None = None,
  mesh: Mesh | None = None,
  key: jax.Array | None = None,
) -> list[list[int]]:
  """Completes token sequences.

  Args:
    model: in compute precision; on a mesh split as in compute (`step.make_gather`).
    prompts: token ids; an empty one starts from `bos`.
    temperature: 0 is greedy.
    top_p: see `sampling.nucleus`.
    stop_ids: tokens that end a completion.
    key: of all randomness; from `config.seed` when None. A token depends on it, on
      its prompt's place in the list and on its position, not on other prompts.

  Returns:
    The new tokens of each prompt, at least one; a stop token that ended them is the
    last.

  Raises:
    ValueError: no prompts, an empty one without `bos`, an id outside the vocabulary,
      or more tokens than `model.max_seq_len`.
  """
  settings = GenerateConfig(
    max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
  )  # refuses impossible values
  rows = _check_prompts(prompts, bos, config, max_new_tokens)
  ranks = 1
  if mesh is not None:
    if mesh.shape[PIPELINE] > 1:
      raise ValueError(
        f"mesh.pipeline={mesh.shape[PIPELINE]}: generation needs 1, with more "
        "mesh.data or mesh.expert instead"
      )
    ranks = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  prompts_BT, lengths_B = _pad_prompts(rows, ranks)
  sampled = settings.temperature > 0
  arguments = (
    model,
    prompts_BT,
    lengths_B,
    _pad(sorted(stop_ids), _round_up(max(1, len(stop_ids)), STOPS_MULTIPLE)),
    np.int32(len(rows)),
    np.int32(max_new_tokens),
    np.float32(temperature) if sampled else None,
    np.float32(top_p) if sampled and top_p < 1 else None,
    jax.random.key(config.seed) if key is None else key,
  )
  static = {
    "cache_length": _round_up(int(lengths_B.max()) + max_new_tokens, LENGTH_MULTIPLE),
    "width": _round_up(max_new_tokens, LENGTH_MULTIPLE),
    "mesh": mesh,
  }
  compile_together("generation", _generate, *arguments, **static)
  tokens_BW = np.asarray(_generate(*arguments, **static))[: len(rows)]
  return [row[row != NOTHING].tolist() for row in tokens_BW]


def _check_prompts(prompts, bos, config: Config, max_new: int) -> list[list[int]]:
  c = config.model
  if not prompts:
    raise ValueError("there are no prompts: give at least one")
  if bos is None and not all(len(prompt) for prompt in prompts):
    raise ValueError("a prompt is empty: give it a token, or say which `bos` is")
  start = [] if bos is None else [bos]
  rows = [[int(i) for i in prompt] or start for prompt in prompts]
  for row in rows:
    outside = [i for i in row if not 0 <= i < c.vocab_size]
    if outside:
      raise ValueError(
        f"token {outside[0]} of a prompt is outside model.vocab_size={c.vocab_size}"
      )
  longest = max(len(row) for row in rows)
  if longest + max_new > c.max_seq_len:
    raise ValueError(
      f"a prompt of {longest} tokens and max_new_tokens={max_new} make "
      f"{longest + max_new}, more than model.max_seq_len={c.max_seq_len}: shorten "
      "one of the two"
    )
  return rows


def _pad_prompts(rows: list[list[int]], ranks: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompts [B, T] and their lengths [B]; rows are added until the ranks divide B."""
  width = _round_up(max(len(row) for row in rows), LENGTH_MULTIPLE)
  rows = rows + [[0]] * (-len(rows) % ranks)
  prompts_BT = np.stack([_pad(row, width, 0) for row in rows])
  return prompts_BT, np.array([len(row) for row in rows], np.int32)


def _pad(values: list[int], width: int, fill: int = NOTHING) -> np.ndarray:
  return np.array(values + [fill] * (width - len(values)), np.int32)


def _round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


@functools.partial(jax.jit, static_argnames=("cache_length", "width", "mesh"))
def _generate(
  model: Model,
  prompts_BT: jax.Array,
  lengths_B: jax.Array,
  stop_ids: jax.Array,
  n_rows: jax.Array,
  max_new: jax.Array,
  temperature: jax.Array | None,
  top_p: jax.Array | None,
  key: jax.Array,
  *,
  cache_length: int,
  width: int,
  mesh: Mesh | None,
) -> jax.Array:
  """New tokens [B, W], `NOTHING` where a row has ended."""
  rows_B = jnp.arange(prompts_BT.shape[0])
  shared = (stop_ids, n_rows, max_new, temperature, top_p, key)
  run = functools.partial(_local_generate, cache_length=cache_length, width=width)
  if mesh is None:
    alone = functools.partial(run, execution=Execution(), axes=None)
    return alone(model, prompts_BT, lengths_B, rows_B, shared)
  split = Execution(expert_axes=split_axes(mesh))
  specs = map_variables(lambda v: v.replace(v.get_metadata()["spec"]), model)
  batch = P(BATCH_AXES)
  # check_vma=False: Pallas kernels do not trace under it in interpret mode.
  return jax.shard_map(
    functools.partial(run, execution=split, axes=BATCH_AXES),
    mesh=mesh,
    in_specs=(specs, batch, batch, batch, P()),
    out_specs=P(),
    check_vma=False,
  )(model, prompts_BT, lengths_B, rows_B, shared)


def _local_generate(
  model: Model,
  prompts_BT,
  lengths_B,
  rows_B,
  shared,
  *,
  cache_length: int,
  width: int,
  execution: Execution,
  axes: tuple[str, ...] | None,
) -> jax.Array:
  """This rank's rows; the tokens of all ranks."""
  stop_ids, n_rows, max_new, temperature, top_p, key = shared

  def choose(hidden_BTD, positions_B):
    """The tokens that belong at `positions`, from the states before them."""
    logits_BV = model.head(model.norm(hidden_BTD[:, 0]))
    keys_B = row_keys(key, rows_B, positions_B)
    return next_tokens(logits_BV, keys_B, temperature, top_p)

  def record(tokens_BW, i, token_B, ended_B):
    """Writes token i of each live row; also which rows live on, and how many do."""
    tokens_BW = tokens_BW.at[:, i].set(jnp.where(ended_B, NOTHING, token_B))
    ended_B |= (token_B[:, None] == stop_ids).any(-1) | (i + 1 >= max_new)
    alive = (~ended_B).sum()
    return tokens_BW, ended_B, lax.psum(alive, axes) if axes else alive

  def decode_one(state):
    i, token_B, tokens_BW, ended_B, _, cache = state
    positions_B = lengths_B + i
    hidden_BTD, cache = model.decode(
      token_B[:, None], cache, positions_B[:, None], execution
    )
    token_B = choose(hidden_BTD, positions_B + 1)
    return i + 1, token_B, *record(tokens_BW, i + 1, token_B, ended_B), cache

  hidden_BTD, cache = model.prefill(prompts_BT, cache_length, execution)
  last_BTD = jnp.take_along_axis(hidden_BTD, lengths_B[:, None, None] - 1, axis=1)
  token_B = choose(last_BTD, lengths_B)
  nothing_BW = jnp.full((len(rows_B), width), NOTHING, jnp.int32)
  start = record(nothing_BW, 0, token_B, rows_B >= n_rows)
  state = (jnp.int32(0), token_B, *start, cache)
  tokens_BW = lax.while_loop(lambda state: state[4] > 0, decode_one, state)[2]
  return lax.all_gather(tokens_BW, axes, tiled=True) if axes else tokens_BW
