"""From the command line's ConfigDict to the frozen `Config`, with plain errors.

Every error is a `ValueError` of one line that names the key or value and the mend.
"""

import ast
import difflib
import os
import re
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_flags import tuple_parser

from deepseek_jax.config import Config
from deepseek_jax.io.plain import from_dict, to_dict
from deepseek_jax.io.workdir import flatten


def to_config_dict(config: Config) -> ConfigDict:
  """A locked ConfigDict with the values of `config`, for `get_config`."""
  return ConfigDict(to_dict(config)).lock()


def to_config(values: ConfigDict) -> Config:
  """The dataclasses that `values` describe.

  Raises:
    ValueError: an unknown key (the nearest valid one is named) or a value that the
      dataclasses refuse.
  """
  plain = values.to_dict()
  for key in flatten(plain):
    _check_key(key)
  for name in ("prompts", "stop"):  # a prompt such as 42 arrives as a number
    if name in plain.get("generate", {}):
      plain["generate"][name] = tuple(str(item) for item in plain["generate"][name])
  try:
    return from_dict(Config, plain)
  except TypeError as error:
    raise ValueError(f"a setting has a value of the wrong type: {error}") from error


def check_arguments(argv: list[str]) -> None:
  """Refuses `--config.KEY` arguments whose KEY no config has, and a missing file.

  Done before flags are parsed, whose own messages for these are tracebacks.
  """
  for argument, following in zip(argv, [*argv[1:], ""]):
    key = re.match(r"--?(?:no)?config\.([^=]*)", argument)
    if key:
      _check_key(key[1])
    file = re.match(r"--?config(?:=(.*)|$)", argument)
    if file:
      path = (following if file[1] is None else file[1]).split(":")[0]
      if not os.path.isfile(path):
        raise FileNotFoundError(f"the config file {path!r} does not exist")


def nearest_key(key: str) -> str:
  """The valid key most like `key`, by its last word first, then as a whole."""
  valid = list(flatten(to_dict(Config())))
  last = key.rsplit(".", 1)[-1]
  same = [name for name in valid if name.rsplit(".", 1)[-1] == last]
  near = difflib.get_close_matches(key, same or valid, 1, cutoff=0.0)
  return near[0]


def _check_key(key: str) -> None:
  valid = flatten(to_dict(Config()))
  if key not in valid:
    raise ValueError(
      f"unknown setting config.{key}: the nearest valid one is "
      f"config.{nearest_key(key)}"
    )


class TupleParser(tuple_parser.TupleParser):
  """Parses tuples, in which `inf` is a number; other text is one string.

  The library's own parser refuses `def f(a, b):` as a prompt and `(1.5, inf)` as a
  list of numbers.
  """

  def parse(self, argument: Any) -> tuple[Any, ...]:
    if not isinstance(argument, str):
      return super().parse(argument)
    try:
      value = ast.literal_eval(re.sub(r"\binf\b", "1e999", argument))
    except (ValueError, SyntaxError, TypeError):
      return (argument,)
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def register_tuple_parser(config_flags: Any) -> None:
  """Makes `config_flags` use `TupleParser` for settings that are tuples."""
  config_flags.register_flag_parser_for_type(tuple, TupleParser())


def last_line(error: Exception) -> str:
  """The last line of an error: of absl's, the config file's own message."""
  lines = [line for line in str(error).splitlines() if line.strip()]
  return re.sub(r"^\w*Error: ", "", lines[-1].strip()) if lines else str(error)
