"""Windows give what the same calls give in a row, and mark their transfers for XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.parallel.windows import beside


def in_window(stream, x, y):
  transfers = [(lambda pair: pair[0] + pair[1], (x, y)), (jnp.negative, y)]
  (total, negative), product = beside(transfers, lambda a: a @ a, x, stream)
  (doubled,), root = beside([(lambda a: 2 * a, product)], jnp.sqrt, total, stream)
  return total, negative, product, doubled, root


@pytest.mark.parametrize("stream", [1, None])
def test_values(stream):
  x, y = jnp.arange(1.0, 10).reshape(3, 3), jnp.full((3, 3), 2.0)
  got = jax.jit(in_window, static_argnums=0)(stream, x, y)
  for a, b in zip(got, (x + y, -y, x @ x, 2 * (x @ x), jnp.sqrt(x + y))):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("stream", "calls"), [(1, 3), (None, 0)])
def test_each_transfer_is_a_call_on_the_stream(stream, calls):
  x = jnp.ones((3, 3))
  traced = jax.jit(in_window, static_argnums=0).trace(stream, x, x)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  marked = [line for line in text.splitlines() if "_xla_stream_annotation" in line]
  assert sum(" call @" in line for line in marked) == calls
  assert text.count("optimization_barrier") == 4
