"""ZeRO-1: optimizer state split over the data axes (DeepSeek-V3 report, 3.2).

Every master parameter lives as a shard: split over its own axes (experts, stages) and
one of its other dimensions over the data axes. Once a step weights are gathered out
and gradients scattered in; between the two nothing else communicates parameters.

A parameter none of whose dimensions divides by the number of data ranks is kept whole
on each of them, and its gradients are summed instead of scattered.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from deepseek_jax.mesh import AXES, BATCH_AXES


@dataclasses.dataclass(frozen=True)
class Layout:
  """How one parameter is split."""

  compute: P  # in forward and backward
  axes: tuple[str, ...]  # data axes it is replicated over in compute, size > 1
  dim: int | None  # dimension split over `axes` at rest; None: replicated
  copies: int  # devices that hold the same elements at rest

  @property
  def stored(self) -> P:
    if self.dim is None:
      return self.compute
    entries = list(self.compute) + [None] * (self.dim + 1 - len(self.compute))
    entries[self.dim] = self.axes[0] if len(self.axes) == 1 else self.axes
    return P(*entries)


def plan_layout(shape: tuple[int, ...], spec: P, mesh: Mesh, split: bool) -> Layout:
  """Chooses the longest free dimension that the data ranks divide."""
  used = {axis for entry in spec if entry for axis in _names(entry)}
  axes = tuple(a for a in BATCH_AXES if a not in used and mesh.shape[a] > 1)
  ranks = math.prod(mesh.shape[a] for a in axes)
  taken = [i < len(spec) and spec[i] is not None for i in range(len(shape))]
  free = [i for i, n in enumerate(shape) if not taken[i] and n % ranks == 0]
  dim = max(free, key=lambda i: shape[i]) if free and axes and split else None
  apart = math.prod(mesh.shape[a] for a in used) * (ranks if dim is not None else 1)
  copies = math.prod(mesh.shape[a] for a in AXES) // apart
  return Layout(spec, axes, dim, copies)


def _names(entry) -> tuple[str, ...]:
  return (entry,) if isinstance(entry, str) else tuple(entry)


def gather_weight(shard: jax.Array, layout: Layout, dtype) -> jax.Array:
  """The whole compute weight from its shards, cast before it travels."""
  shard = shard.astype(dtype)
  if layout.dim is None:
    return shard
  return lax.all_gather(shard, layout.axes, axis=layout.dim, tiled=True)


def scatter_gradient(gradient: jax.Array, layout: Layout) -> jax.Array:
  """This device's shard of the gradient summed over the data ranks."""
  if not layout.axes:
    return gradient
  if layout.dim is None:
    return lax.psum(gradient, layout.axes)
  return lax.psum_scatter(
    gradient, layout.axes, scatter_dimension=layout.dim, tiled=True
  )


def global_norm(
  gradients: Mapping[str, jax.Array], layouts: Mapping[str, Layout]
) -> jax.Array:
  """Euclidean norm of the whole gradient from every device's shards."""
  squares = jnp.zeros((), jnp.float32)
  for name, gradient in gradients.items():
    squares += jnp.sum(gradient * gradient) / layouts[name].copies
  return jnp.sqrt(lax.psum(squares, AXES))
