"""The next token from logits: greedy, temperature, top-p (nucleus, 1904.09751).

Each row has its own key, so a row's choice does not depend on its neighbours in the
batch. Left out: top-k, repetition penalties.

Shape suffixes: B batch, V vocabulary.
"""

import jax
import jax.numpy as jnp


def nucleus(probs_BV: jax.Array, top_p: jax.Array | float) -> jax.Array:
  """The smallest set of likeliest tokens whose mass reaches `top_p`, bool [B, V].

  The token that crosses `top_p` belongs to it, so it is never empty. Of equally
  likely tokens the lowest ids come first.
  """
  b, v = probs_BV.shape
  sorted_BV, order_BV = jax.lax.top_k(probs_BV, v)
  reached_BV = jnp.cumsum(sorted_BV, axis=-1)
  before_BV = jnp.pad(reached_BV[:, :-1], ((0, 0), (1, 0)))
  kept_BV = (before_BV < top_p) & (sorted_BV > 0)
  rows = jnp.arange(b)[:, None]
  return jnp.zeros((b, v), bool).at[rows, order_BV].set(kept_BV)


def row_keys(key: jax.Array, rows_B: jax.Array, positions_B: jax.Array) -> jax.Array:
  """A key for the token at a position of a row: the same in any batch."""
  return jax.vmap(
    lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position)
  )(rows_B, positions_B)


def next_tokens(
  logits_BV: jax.Array,
  keys_B: jax.Array,
  temperature: jax.Array | float | None = None,
  top_p: jax.Array | float | None = None,
) -> jax.Array:
  """Chooses a token a row, int32 [B].

  Args:
    logits_BV: FP32.
    keys_B: see `row_keys`; unused when greedy.
    temperature: divides the logits; None: greedy, ties to the lowest id.
    top_p: mass that the choice is confined to, after temperature; None: all of it.
  """
  if temperature is None:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  # The maximum goes first: a tiny temperature must not make inf - inf.
  logits_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
  logits_BV = logits_BV / temperature
  if top_p is not None:
    kept_BV = nucleus(jax.nn.softmax(logits_BV, axis=-1), top_p)
    logits_BV = jnp.where(kept_BV, logits_BV, -jnp.inf)
  return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
