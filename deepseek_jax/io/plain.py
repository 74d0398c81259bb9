"""Configs as nested plain dicts, for JSON and command lines, and back."""

import dataclasses
from typing import Any

from deepseek_jax.config import ModelConfig
from deepseek_jax.dense_config import DenseConfig


def to_dict(config: Any) -> dict[str, Any]:
  """A dataclass config as nested plain dicts; tuples stay tuples."""
  return {
    f.name: to_dict(value) if dataclasses.is_dataclass(value) else value
    for f in dataclasses.fields(config)
    for value in [getattr(config, f.name)]
  }


def from_dict(kind: type, values: dict[str, Any]) -> Any:
  """The inverse of `to_dict`; lists become tuples.

  Where a `ModelConfig` is asked for, fields that only a `DenseConfig` has make one.

  Raises:
    ValueError: a key that `kind` does not have, or a value that it refuses.
  """
  if kind is ModelConfig and "n_kv_heads" in values:
    kind = DenseConfig
  fields = {f.name: f for f in dataclasses.fields(kind)}
  unknown = sorted(set(values) - set(fields))
  if unknown:
    raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}")
  built = {}
  for name, value in values.items():
    nested = fields[name].type
    if isinstance(value, dict) and dataclasses.is_dataclass(nested):
      value = from_dict(nested, value)  # pyright: ignore[reportArgumentType]
    built[name] = _as_tuple(value)
  return kind(**built)


def _as_tuple(value: Any) -> Any:
  if isinstance(value, list | tuple):
    return tuple(_as_tuple(item) for item in value)
  return value
