"""AdamW with moments in BF16 (DeepSeek-V3 report, 3.3.3), on one shard.

Arithmetic is FP32; only the stored moments are rounded. With FP32 moments it equals
`optax.adamw`. optax can round the first moment but not the second, hence our own.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.config import TrainConfig


def adamw(
  parameter: jax.Array,
  gradient: jax.Array,
  mu: jax.Array,
  nu: jax.Array,
  *,
  count: jax.Array,
  learning_rate: jax.Array,
  decay: bool,
  config: TrainConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """One update.

  Args:
    parameter, gradient: FP32, of one shape.
    mu, nu: moments as stored.
    count: updates so far, this one included.
    decay: whether weight decay applies.

  Returns:
    The new parameter and moments, in the dtypes that came in.
  """
  b1, b2 = config.beta1, config.beta2
  m = b1 * mu.astype(jnp.float32) + (1 - b1) * gradient
  v = b2 * nu.astype(jnp.float32) + (1 - b2) * gradient * gradient
  m_hat = m / (1 - b1**count)
  v_hat = v / (1 - b2**count)
  update = m_hat / (jnp.sqrt(v_hat) + config.adam_eps)
  if decay:
    update += config.weight_decay * parameter
  parameter = parameter - learning_rate * update
  return parameter, m.astype(mu.dtype), v.astype(nu.dtype)
