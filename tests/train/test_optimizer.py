"""AdamW against optax, and what BF16 moments cost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax.config import TrainConfig
from deepseek_jax.train.optimizer import adamw


def steps(dtype, n=20, decay=True):
  rng = np.random.default_rng(0)
  config = TrainConfig()
  p = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
  m = v = jnp.zeros(p.shape, dtype)
  q, reference = p, optax.adamw(
    1e-2, 0.9, 0.95, eps=1e-8, weight_decay=0.1 if decay else 0.0
  )  # fmt: skip
  state = reference.init(q)
  for i in range(n):
    g = jnp.asarray(rng.normal(size=(6, 5)) * 10.0 ** rng.integers(-4, 1), jnp.float32)
    p, m, v = adamw(
      p, g, m, v, count=jnp.int32(i + 1), learning_rate=jnp.float32(1e-2),
      decay=decay, config=config,
    )  # fmt: skip
    update, state = reference.update(g, state, q)
    q = optax.apply_updates(q, update)
  assert m.dtype == v.dtype == dtype
  return p, q


@pytest.mark.parametrize("decay", [True, False])
def test_fp32_moments_equal_optax(decay):
  p, q = steps(jnp.float32, decay=decay)
  np.testing.assert_allclose(p, q, rtol=1e-5, atol=1e-6)


def test_bf16_moments_stay_close():
  p, q = steps(jnp.bfloat16)
  # 20 updates of about 1e-2, each moment within 2^-8 of itself.
  np.testing.assert_allclose(p, q, atol=20 * 1e-2 * 2**-6)
  assert jnp.abs(p - q).max() > 0


def test_it_is_traceable_and_finite_at_zero_gradient():
  zero = jnp.zeros((3,))
  run = jax.jit(
    lambda p: adamw(
      p, zero, zero, zero, count=jnp.int32(1), learning_rate=jnp.float32(1.0),
      decay=False, config=TrainConfig(),
    )[0]
  )  # fmt: skip
  np.testing.assert_array_equal(run(jnp.ones(3)), np.ones(3))
