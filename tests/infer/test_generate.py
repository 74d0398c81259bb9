"""Generation against the uncached model, in every batch, and on a mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from deepseek_jax.config import Config, GenerateConfig, TrainConfig
from deepseek_jax.data import chat
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.tokenizer import SPECIALS, train_tokenizer
from deepseek_jax.dense_config import TINY_DENSE
from deepseek_jax.infer import generate as generate_module
from deepseek_jax.infer.generate import generate, generate_text
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.dense import DenseTransformer
from deepseek_jax.model.layers import map_variables
from deepseek_jax.model.transformer import Transformer
from tests.model.random_models import MHA_YARN, MLA, YARN, random_model, randomise

PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12, 13], [60, 3, 60, 3, 60]]
NEW = 20  # tokens
# MLA with experts, and plain attention without any: the two kinds of cache.
MODELS = {
  "mla": YARN,
  "mha": dataclasses.replace(MHA_YARN, n_layers=2, n_dense_layers=2),
}


def run_config(model) -> Config:
  train = TrainConfig(seq_len=16, batch_size=1)
  return Config(model=model, train=train, precision="fp32")


@functools.cache
def tiny(kind: str) -> tuple[Transformer, Config]:
  return random_model(MODELS[kind]), run_config(MODELS[kind])


full_forward = jax.jit(Transformer.logits)


@functools.cache
def expected_greedy(kind: str) -> list[list[int]]:
  """The meaning of greedy generation: a full forward pass for each token."""
  model, rows = tiny(kind)[0], np.arange(len(PROMPTS))
  tokens = np.zeros((len(PROMPTS), 32), np.int32)
  lengths = np.array([len(prompt) for prompt in PROMPTS])
  for row, prompt in enumerate(PROMPTS):
    tokens[row, : len(prompt)] = prompt
  for _ in range(NEW):
    logits = np.asarray(full_forward(model, tokens))
    tokens[rows, lengths] = logits[rows, lengths - 1].argmax(-1)
    lengths += 1
  return [row[n - NEW : n].tolist() for row, n in zip(tokens, lengths)]


@functools.partial(jax.jit, static_argnums=2)
def prefill(model, tokens, length):
  hidden, cache = model.prefill(tokens, length)
  return model.head(model.norm(hidden)), cache


@jax.jit
def decode(model, tokens, cache, positions):
  hidden, cache = model.decode(tokens, cache, positions)
  return model.head(model.norm(hidden)), cache


@pytest.mark.parametrize("kind", MODELS)
def test_prefill_and_decode_are_the_full_forward(kind):
  """Rows of unequal prompts, each continued at its own position."""
  model, _ = tiny(kind)
  tokens = np.random.default_rng(0).integers(0, MLA.vocab_size, (4, 32))
  lengths = np.array([3, 12, 8, 1])
  full = np.asarray(full_forward(model, tokens))
  padded = np.where(np.arange(12) < lengths[:, None], tokens[:, :12], 63)
  logits, cache = prefill(model, padded, 24)
  for row, n in enumerate(lengths):
    np.testing.assert_allclose(logits[row, :n], full[row, :n], rtol=0, atol=1e-5)
  for step in range(0, 12, 2):  # two tokens at a time
    places = lengths[:, None] + step + np.arange(2)
    new = np.take_along_axis(tokens, places, axis=1)
    logits, cache = decode(model, new, cache, places)
    wanted = np.take_along_axis(full, places[..., None], axis=1)
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_is_greedy_without_cache(kind):
  model, config = tiny(kind)
  assert generate(model, config, PROMPTS, max_new_tokens=NEW) == expected_greedy(kind)


def test_greedy_depends_on_neither_batch_nor_padding(monkeypatch):
  model, config = tiny("mla")
  expected = expected_greedy("mla")
  order = [2, 0, 3, 1]
  shuffled = generate(model, config, [PROMPTS[i] for i in order], max_new_tokens=NEW)
  assert shuffled == [expected[i] for i in order]
  monkeypatch.setattr(generate_module, "LENGTH_MULTIPLE", 7)
  alone = generate(model, config, [PROMPTS[1]], max_new_tokens=NEW)
  assert alone == [expected[1]]


def test_stop_tokens_end_their_row_only():
  model, config = tiny("mla")
  full = expected_greedy("mla")
  # A token that ends one row in mid-course and lets another run to its end.
  stop = next(
    token
    for row in full
    for token in row[3:]
    if token not in row[:3] and not all(token in other for other in full)
  )
  stops = [stop, 99]
  found = generate(model, config, PROMPTS, max_new_tokens=NEW, stop_ids=stops)
  for row, ended in zip(full, found):
    at = next((i for i, token in enumerate(row) if token in stops), len(row) - 1)
    assert ended == row[: at + 1]
  first = generate(model, config, PROMPTS, max_new_tokens=NEW, stop_ids=range(64))
  assert first == [row[:1] for row in full]


def test_programs_are_shared():
  """Lengths within a bucket, stops and temperatures need no new program."""
  model, config = tiny("mla")
  run = functools.partial(generate, model, config)
  run(PROMPTS, max_new_tokens=NEW)
  run(PROMPTS, max_new_tokens=NEW, temperature=0.5, top_p=0.5)
  compiled = generate_module._generate._cache_size()
  run([[1]] * 4, max_new_tokens=3, stop_ids=[5, 6])
  run([list(range(30))] * 4, max_new_tokens=25, temperature=0.7, top_p=0.9)
  assert generate_module._generate._cache_size() == compiled


def test_sampling_is_reproducible_and_knows_no_neighbours():
  model, config = tiny("mla")
  run = functools.partial(
    generate, model, config, max_new_tokens=12, temperature=1.0, top_p=0.9
  )
  first = run(PROMPTS, key=jax.random.key(1))
  assert first == run(PROMPTS, key=jax.random.key(1))
  assert first != run(PROMPTS, key=jax.random.key(2))
  others = run([[9, 9], *PROMPTS[1:3], [4] * 40], key=jax.random.key(1))
  assert others[1:3] == first[1:3]
  assert run(PROMPTS) == run(PROMPTS, key=jax.random.key(config.seed))
  same = run([[3, 4]] * 4)
  assert len({tuple(row) for row in same}) > 1  # rows draw apart


def test_first_and_second_token_have_the_models_distribution(monkeypatch):
  """2,000 rows of one prompt, against the exact probabilities of pairs."""
  monkeypatch.setattr(generate_module, "LENGTH_MULTIPLE", 4)
  config = dataclasses.replace(MODELS["mha"], vocab_size=6)
  model = random_model(config, seed=3)
  rows = generate(
    model, run_config(config), [[1, 2, 3]] * 2000, max_new_tokens=2, temperature=1.5
  )
  texts = np.array([[1, 2, 3, first] for first in range(6)])
  logits = np.asarray(full_forward(model, texts), np.float64) / 1.5
  probs = np.exp(logits - logits.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  pairs = probs[0, 2][:, None] * probs[:, 3]
  counts = np.zeros((6, 6))
  np.add.at(counts, tuple(np.array(rows).T), 1)
  expected = 2000 * pairs
  often = expected > 5  # the rest in one bin
  bins = np.append(expected[often], expected[~often].sum())
  seen = np.append(counts[often], counts[~often].sum())
  chi_square = ((seen - bins) ** 2 / np.maximum(bins, 1)).sum()
  freedom = len(bins) - 1
  assert chi_square < freedom + 6 * (2 * freedom) ** 0.5, (chi_square, freedom)


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
def test_mesh_is_one_device():
  """2 x 4 devices, four rows padded to eight; ranks are done at different times."""
  model, config = tiny("mla")
  mesh = make_mesh(data=2, expert=4, devices=jax.devices()[:8])
  split = map_variables(
    lambda v: v.replace(
      jax.device_put(v[...], NamedSharding(mesh, v.get_metadata()["spec"]))
    ),
    model,
  )
  run = functools.partial(
    generate,
    config=config,
    prompts=PROMPTS,
    max_new_tokens=NEW,
    temperature=1.0,
    top_p=0.95,
    stop_ids=range(0, 64, 9),
    key=jax.random.key(4),
  )
  alone = run(model)
  assert len({len(row) for row in alone}) > 1
  assert run(split, mesh=mesh) == alone
  assert run(split, mesh=mesh, key=jax.random.key(5)) != alone


def test_an_empty_prompt_starts_from_bos():
  model, config = tiny("mla")
  run = functools.partial(generate, model, config, max_new_tokens=4)
  assert run([[], [5], [], [6]], bos=7) == run([[7], [5], [7], [6]])
  with pytest.raises(ValueError, match="a prompt is empty"):
    run([[1], []])


def test_refusals():
  model, config = tiny("mla")
  run = functools.partial(generate, model, config)
  with pytest.raises(ValueError, match="no prompts"):
    run([], max_new_tokens=4)
  with pytest.raises(ValueError, match=r"prompt of 250 .*max_new_tokens=7.*257.*=256"):
    run([[1], [1] * 250], max_new_tokens=7)
  with pytest.raises(ValueError, match=r"token 64 .* model.vocab_size=64"):
    run([[64]], max_new_tokens=4)
  with pytest.raises(ValueError, match="max_new_tokens=0"):
    run([[1]], max_new_tokens=0)
  with pytest.raises(ValueError, match="temperature=-1"):
    run([[1]], max_new_tokens=1, temperature=-1)
  with pytest.raises(ValueError, match="top_p=0"):
    run([[1]], max_new_tokens=1, top_p=0)


def test_the_last_place_can_be_used():
  model, config = tiny("mha")
  (row,) = generate(model, config, [[1] * 236], max_new_tokens=NEW)
  assert len(row) == 20


@functools.cache
def text_model():
  """A trained tokenizer and a model of its vocabulary."""
  tokenizer = train_tokenizer(["def f(x):\n  return x + 1\n"] * 20, 300)
  model = dataclasses.replace(MODELS["mha"], vocab_size=300)
  return tokenizer, random_model(model), run_config(model)


def test_text_is_encoded_behind_bos_and_decoded():
  tokenizer, model, config = text_model()
  bos, encode = tokenizer.bos, tokenizer.encode
  hole = "<｜fim▁begin｜>def f(x):\n<｜fim▁hole｜>\n<｜fim▁end｜>"
  prompts = ["def f", "", "<｜begin▁of▁sentence｜>x", hole]
  settings = GenerateConfig(max_new_tokens=10)
  texts = generate_text(model, config, tokenizer, prompts, settings)
  t = tokenizer
  pieces = [t.fim_begin, *encode("def f(x):\n"), t.fim_hole, *encode("\n"), t.fim_end]
  ids = [[bos, *encode("def f")], [bos], [bos, *encode("x")], [bos, *pieces]]
  rows = generate(model, config, ids, max_new_tokens=10)
  ends = [row.index(t.eos) if t.eos in row else len(row) for row in rows]
  assert texts == [t.decode(row[:end]) for row, end in zip(rows, ends)]


def test_text_ends_before_eos_and_stops(monkeypatch):
  tokenizer, model, config = text_model()
  t = tokenizer
  prompts, settings = ["def", "x", "1", ""], GenerateConfig(max_new_tokens=10)
  ids = [[t.bos, *t.encode(text)] for text in prompts]
  rows = generate(model, config, ids, max_new_tokens=10)

  def until(row, stops):
    return t.decode(row[: next((i for i, x in enumerate(row) if x in stops), None)])

  # A token of the first row that is a text of its own.
  stop = next(x for x in rows[0] if t.encode(t.decode([x])) == [x])
  settings = dataclasses.replace(settings, stop=(t.decode([stop]),))
  texts = generate_text(model, config, t, prompts, settings)
  assert texts == [until(row, {t.eos, stop}) for row in rows]
  monkeypatch.setattr(tokenizer, "eos", rows[1][2])
  settings = dataclasses.replace(settings, stop=())
  texts = generate_text(model, config, t, prompts, settings)
  assert texts == [until(row, {rows[1][2]}) for row in rows]
  settings = dataclasses.replace(settings, stop=("def f(x): return",))
  with pytest.raises(ValueError, match="not one"):
    generate_text(model, config, t, prompts, settings)


def test_prompts_as_questions_in_a_chat_template():
  tokenizer, model, config = text_model()
  bos, eos, user, assistant = (SPECIALS[i] for i in (0, 1, 6, 7))
  template = ChatTemplate(chat.V3, {"bos_token": bos, "eos_token": eos})
  for mode, opening in (("template", ""), ("thinking", "<think>\n")):
    settings = GenerateConfig(max_new_tokens=10, chat=mode)
    texts = generate_text(
      model, config, tokenizer, ["def f"], settings, template=template
    )
    ids = tokenizer.encode(f"{bos}{user}def f{assistant}{opening}")
    assert ids[:2] == [0, 6]
    row = generate(model, config, [ids], max_new_tokens=10)[0]
    end = row.index(tokenizer.eos) if tokenizer.eos in row else len(row)
    assert texts == [tokenizer.decode(row[:end])]
    with pytest.raises(ValueError, match=f"chat={mode} needs a chat template"):
      generate_text(model, config, tokenizer, ["def f"], settings)
  with pytest.raises(ValueError, match="chat='on' must be off, template or thinking"):
    GenerateConfig(chat="on")


def test_a_dense_model_in_a_batch_and_on_a_mesh():
  """As `DenseTransformer.logits` chooses, token by token, in rows of all lengths."""
  settings = dataclasses.replace(TINY_DENSE, vocab_size=64, dim=32, n_layers=2)
  blank = jax.eval_shape(lambda: DenseTransformer(settings, jax.random.key(0)))
  model, config = randomise(blank, 0), run_config(settings)
  rows = generate(model, config, PROMPTS, max_new_tokens=NEW)
  full = jax.jit(DenseTransformer.logits)
  for prompt, row in zip(PROMPTS, rows):
    tokens = np.zeros((1, 32), np.int32)
    tokens[0, : len(prompt) + NEW] = [*prompt, *row]
    logits = np.asarray(full(model, tokens))[0]
    chosen = logits[len(prompt) - 1 : len(prompt) - 1 + NEW].argmax(-1)
    assert row == chosen.tolist()
  mesh = make_mesh(data=2, expert=2, devices=jax.devices()[:4])
  placed = map_variables(
    lambda v: v.replace(
      jax.device_put(v[...], NamedSharding(mesh, v.get_metadata()["spec"]))
    ),
    model,
  )
  assert generate(placed, config, PROMPTS, max_new_tokens=NEW, mesh=mesh) == rows
