"""Grouped matrix product in plain jnp, FP32: the meaning of the operation.

Every expert multiplies every row and a mask keeps its own: obviously right, E times
the work.

Shapes: Z rows, E experts (groups), D input, F output; G groups of capacity C.
"""

import jax
import jax.numpy as jnp
from jax import lax

ROW_MULTIPLE = 1


def multiply(
  x_ZD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, transpose_w: bool = False
) -> jax.Array:
  """Row z of group e becomes x_z @ w_e (or @ w_e^T); rows of no group become 0."""
  w_EDF = jnp.swapaxes(w_EDF, 1, 2) if transpose_w else w_EDF

  def add_expert(y_ZF, expert):
    mask_Z, w_DF = expert
    own_ZD = jnp.where(mask_Z[:, None], x_ZD, 0).astype(jnp.float32)
    w_DF = w_DF.astype(jnp.float32)
    return y_ZF + jnp.dot(own_ZD, w_DF, precision=lax.Precision.HIGHEST), None

  y_ZF = jnp.zeros((x_ZD.shape[0], w_EDF.shape[2]), jnp.float32)
  mask_EZ = _membership(sizes_E, x_ZD.shape[0])
  return lax.scan(add_expert, y_ZF, (mask_EZ, w_EDF))[0].astype(x_ZD.dtype)


def multiply_rows(
  x_ZD: jax.Array, dy_ZF: jax.Array, sizes_E: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
  """For each group the sum over its rows of x^T dy, [E, D, F]; 0 for empty groups."""

  def one_expert(mask_Z):
    own_ZD = jnp.where(mask_Z[:, None], x_ZD, 0).astype(jnp.float32)
    own_ZF = jnp.where(mask_Z[:, None], dy_ZF, 0).astype(jnp.float32)
    return jnp.dot(own_ZD.T, own_ZF, precision=lax.Precision.HIGHEST).astype(dtype)

  return lax.map(one_expert, _membership(sizes_E, x_ZD.shape[0]))


def multiply_masked(
  x_GCD: jax.Array, w_GDF: jax.Array, counts_G: jax.Array, transpose_w: bool = False
) -> jax.Array:
  """The first counts_G rows of each group times its matrix, 0 in the others."""
  w_GDF = jnp.swapaxes(w_GDF, 1, 2) if transpose_w else w_GDF
  own_GC = jnp.arange(x_GCD.shape[1]) < counts_G[:, None]
  x_GCD = jnp.where(own_GC[:, :, None], x_GCD, 0)
  y_GCF = jnp.einsum(
    "gcd,gdf->gcf",
    x_GCD.astype(jnp.float32),
    w_GDF.astype(jnp.float32),
    precision=lax.Precision.HIGHEST,
  )
  return y_GCF.astype(x_GCD.dtype)


def _membership(sizes_E: jax.Array, rows: int) -> jax.Array:
  """[E, Z] bool: does row z belong to group e?"""
  end_E = jnp.cumsum(sizes_E)
  row_Z = jnp.arange(rows)
  return (row_Z >= (end_E - sizes_E)[:, None]) & (row_Z < end_E[:, None])
