"""Matrix products of every projection, in one place.

All weights of the network except embedding, head and router meet activations here,
so a change of arithmetic (DeepSeek-V3 report, section 3.3) is a change of this file.
"""

import math

import jax
from jax import lax


def linear(x: jax.Array, w: jax.Array, contract: int = 1) -> jax.Array:
  """x @ w over the last `contract` dimensions of x and the first of w.

  Args:
    x: activations [..., i1, ..., ic].
    w: weights [i1, ..., ic, o1, ...], of x's dtype.
    contract: c, the number of contracted dimensions.

  Returns:
    [..., o1, ...] in x's dtype; products accumulate in FP32 at least.
  """
  inner = math.prod(w.shape[:contract])
  batch, out = x.shape[: x.ndim - contract], w.shape[contract:]
  y = lax.dot_general(
    x.reshape(-1, inner), w.reshape(inner, -1), (((1,), (0,)), ((), ()))
  )
  return y.reshape(*batch, *out)
