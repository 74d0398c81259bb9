"""Parameters, RMSNorm, embedding and SwiGLU: what every block is made of.

A parameter's PartitionSpec stands beside its shape, here and nowhere else: `spec`
names mesh axes for the dimensions that are split in compute. Everything not named
is whole on every device. Sources: DeepSeek-V3 report, sections 2 and 4.2.

Shape suffixes: B batch, T time, D model, F hidden, V vocabulary, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from deepseek_jax.mesh import PIPELINE
from deepseek_jax.precision.feed_forward import feed_forward
from deepseek_jax.precision.tiles import Fp8Weight, Recipe, quantize_weight


class RouterBias(nnx.Variable):
  """The selection bias of a router: state that no gradient trains."""


def weight(
  key: jax.Array,
  shape: tuple[int, ...],
  std: float,
  spec: P | None = None,
  **flags: Any,
) -> nnx.Param:
  """A normal(0, std) parameter in FP32.

  Flags: `high_precision=True` keeps it in FP32 in compute too; `inputs` and `outputs`
  mark the weight of a Linear, which FP8 training quantises, and say how many of its
  last dimensions are contracted with activations and how many come out; `absorbed=True`
  that decoding multiplies it with other weights' outputs, not as a Linear.
  """
  value = std * jax.random.normal(key, shape, jnp.float32)
  return nnx.Param(value, spec=spec or P(), **flags)


def is_variable(node: Any) -> bool:
  return isinstance(node, nnx.Variable)


def map_variables(fn: Callable[..., Any], *trees: Any) -> Any:
  """`jax.tree.map` over the variables of modules, metadata in hand."""
  return jax.tree.map(fn, *trees, is_leaf=is_variable)


def named_variables(module: Any) -> dict[str, Any]:
  """The variables of a module by dotted path, the names that checkpoints use."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(module, is_leaf=is_variable)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): variable
    for path, variable in leaves
  }


def stack[M: nnx.Module](make: Callable[[jax.Array], M], key: jax.Array, n: int) -> M:
  """n modules as one with a leading layer axis, which the pipeline splits."""
  stacked = jax.vmap(make)(jax.random.split(key, n))
  return map_variables(
    lambda v: v.replace(spec=P(PIPELINE, *v.get_metadata()["spec"])), stacked
  )


def cast_for_compute[M: nnx.Module](module: M, dtype: Any) -> M:
  """The copy that forward and backward use; see `weight` for what stays FP32."""

  def cast(variable):
    if variable.get_metadata().get("high_precision"):
      return variable
    return variable.replace(variable[...].astype(dtype))

  return map_variables(cast, module)


def quantize_for_compute[M: nnx.Module](module: M, recipe: Recipe) -> M:
  """The module with every Linear's weight in FP8, in both layouts."""

  def quantize(variable):
    flags = variable.get_metadata()
    if not flags.get("inputs"):
      return variable
    return variable.replace(
      quantize_weight(variable[...], flags["inputs"], flags["outputs"], recipe)
    )

  return map_variables(quantize, module)


def quantize_for_generation[M: nnx.Module](module: M, recipe: Recipe) -> M:
  """The module with Linears' weights in FP8, in one layout: about a byte a weight.

  What decoding absorbs stays as it is, as in the released code.
  """

  def quantize(variable):
    flags = variable.get_metadata()
    if not flags.get("inputs") or flags.get("absorbed"):
      return variable
    inputs, outputs = flags["inputs"], flags["outputs"]
    quantized = quantize_weight(variable[...], inputs, outputs, recipe)
    return variable.replace(quantized.forward_only())

  return map_variables(quantize, module)


def gradient_targets[M: nnx.Module](module: M) -> M:
  """What to differentiate with respect to: the weights, or what stands for FP8 ones."""

  def target(variable):
    value = variable[...]
    return (
      variable.replace(value.gradient) if isinstance(value, Fp8Weight) else variable
    )

  return map_variables(target, module)


def with_gradient_targets[M: nnx.Module](module: M, targets: M) -> M:
  """The module again, so that gradients with respect to `targets` flow through it."""

  def put(variable, target):
    value = variable[...]
    if not isinstance(value, Fp8Weight):
      return target
    return variable.replace(dataclasses.replace(value, gradient=target[...]))

  return map_variables(put, module, targets)


def widen(x: jax.Array) -> jax.Array:
  """x in FP32, or as it is if wider."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class RMSNorm(nnx.Module):
  """Root-mean-square normalisation over the last dimension, in FP32."""

  def __init__(self, dim: int, eps: float):
    self.weight = nnx.Param(
      jnp.ones((dim,), jnp.float32), spec=P(), high_precision=True, norm=True
    )
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = widen(x)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
    return (wide * scale * self.weight[...]).astype(x.dtype)


@jax.custom_vjp
def look_up(table_VD: jax.Array, ids: jax.Array) -> jax.Array:
  """Rows of the table; the gradient sums repeated ids in FP32 before rounding."""
  return table_VD[ids]


def _look_up_fwd(table_VD, ids):
  return table_VD[ids], (ids, jnp.zeros((0, *table_VD.shape), table_VD.dtype))


def _look_up_bwd(residuals, g):
  ids, like = residuals
  wide = widen(g).reshape(-1, g.shape[-1])
  total = jnp.zeros(like.shape[1:], wide.dtype).at[ids.reshape(-1)].add(wide)
  return total.astype(like.dtype), None


look_up.defvjp(_look_up_fwd, _look_up_bwd)


class Embedding(nnx.Module):
  def __init__(self, vocab: int, dim: int, std: float, key: jax.Array):
    self.weight = weight(key, (vocab, dim), std)

  def __call__(self, ids: jax.Array) -> jax.Array:
    return look_up(self.weight[...], ids)


class Head(nnx.Module):
  """The output projection; the loss uses its weight chunk by chunk."""

  def __init__(self, dim: int, vocab: int, std: float, key: jax.Array):
    self.weight = weight(key, (dim, vocab), std)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Logits in FP32."""
    w = self.weight[...]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x, w, preferred_element_type=wide)


class FeedForward(nnx.Module):
  """SwiGLU: w2(silu(w1 x) * (w3 x)), with w1 and w3 side by side in `w13`."""

  def __init__(self, dim: int, hidden: int, std: float, key: jax.Array):
    k13, k2 = jax.random.split(key)
    self.w13 = weight(k13, (dim, 2 * hidden), std, inputs=1, outputs=1)
    self.w2 = weight(k2, (hidden, dim), std, inputs=1, outputs=1)

  def __call__(self, x: jax.Array) -> jax.Array:
    return feed_forward(x, self.w13[...], self.w2[...])
