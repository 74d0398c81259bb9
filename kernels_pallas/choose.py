"""Picks an implementation by the platform that the present computation is meant for."""

import warnings
from collections.abc import Collection, Mapping

import jax


def target_platform() -> str:
  """The platform being traced for: 'cpu', 'gpu' or 'tpu'.

  Inside `jax.shard_map` it is the platform of the mesh, so a step that is compiled
  ahead of time for a TPU topology on a CPU machine picks the TPU's kernels; elsewhere
  it is JAX's default backend.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  platform = jax.default_backend() if device is None else device.platform
  return "gpu" if platform in ("cuda", "rocm") else platform


def choose(
  op: str,
  impl: str | None,
  by_platform: Mapping[str, str],
  portable: Collection[str],
) -> str:
  """The name of the implementation to use.

  Args:
    op: name of the operation, for messages.
    impl: a name, which is used or refused, or None for the platform's own.
    by_platform: platform -> name of the implementation meant for it.
    portable: names that run on every platform.

  Raises:
    ValueError: an unknown name, or one that does not run on this platform.
  """
  platform = target_platform()
  if impl is None:
    if platform not in by_platform:
      raise ValueError(
        f"{op} has no implementation of its own for platform {platform!r}: "
        f"pass impl= one of {sorted(portable)}"
      )
    return by_platform[platform]
  known = {*by_platform.values(), *portable}
  if impl not in known:
    raise ValueError(f"{op}: impl={impl!r} is unknown, use one of {sorted(known)}")
  if impl not in portable and by_platform.get(platform) != impl:
    usable = sorted(
      {*portable} | {by_platform[p] for p in by_platform if p == platform}
    )
    raise ValueError(
      f"{op}: impl={impl!r} does not run on platform {platform!r}, "
      f"use one of {usable} or None"
    )
  return impl


def warn_of_fallback(op: str, reason: str, instead: str) -> None:
  """Says, once a reason, that no kernel of this platform computes what is traced."""
  warnings.warn(f"{op} {reason}; impl={instead!r} computes it, slowly", stacklevel=3)
