"""The one entry point: a config, a workdir, and the job that the config names.

    python -m experiments.run --config=experiments/configs/pretrain.py:tiny \
      --workdir=runs/tiny --config.train.steps=100

Several processes (hosts) run one job together: see hosts.py for their flags.

Exit code 0 when the job is done, or was stopped by SIGTERM or Ctrl-C with a
checkpoint. What a user can mend (a wrong setting, a missing file, a full disk, a
workdir of another config) is one line on stderr and exit code 1; `--debug` adds the
traceback. Anything else is a defect and keeps its traceback.
"""

import errno
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

# Before JAX is imported. GPUs: leave XLA most of the memory, but not so much that
# libraries outside it (cuBLAS, NCCL) find none.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags
from tqdm import tqdm

from deepseek_jax.config import Config
from deepseek_jax.io import workdir
from experiments import hosts, overrides

if TYPE_CHECKING:
  from deepseek_jax.processes import Group

overrides.register_tuple_parser(config_flags)
_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "config file, with a variant: experiments/configs/pretrain.py:tiny"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of this run's files")
_DEBUG = flags.DEFINE_bool("debug", False, "show tracebacks and library logs")
_JOBS = ("pretrain", "generate", "evaluate", "rebalance", "import", "export")
_PACKAGES = ("deepseek_jax", "kernels_pallas", "experiments", "__main__")
_FILE_ERRORS = (
  FileNotFoundError,
  NotADirectoryError,
  IsADirectoryError,
  PermissionError,
)
_NO_SPACE = ("no space left on device", "disk quota exceeded")


def main(_: Sequence[str]) -> None:
  _set_up_logging()
  group = None
  try:
    config, folder = _read_command()
    group = hosts.join(config.job)
    if group:
      hosts.check_same(config, group)
    _run(config, folder)
    if group:
      group.leave()
  except KeyboardInterrupt:
    _stop("interrupted; the last whole checkpoint, if any, is kept", 130, group)
  except Exception as error:
    if group and (line := group.explain_loss(error)):
      _stop(line, group=group, lost=True)
    if is_expected(error) and not _DEBUG.value:
      _stop(describe(error, _WORKDIR.value), group=group)
    if group is None:
      raise
    traceback.print_exc()
    group.abandon("", 1)


def _read_command() -> tuple[Config, str]:
  """The config and the workdir, checked as far as can be done without JAX."""
  if _CONFIG.value is None:
    raise ValueError(
      "--config is missing: try --config=experiments/configs/pretrain.py:tiny"
    )
  config = overrides.to_config(_CONFIG.value)
  if not _WORKDIR.value:
    raise ValueError("--workdir is missing: name a folder for the run's files")
  if config.job not in _JOBS:
    raise ValueError(f"job={config.job!r} is unknown: use one of {', '.join(_JOBS)}")
  if config.job == "pretrain":
    workdir.check(config, _WORKDIR.value)
  return config, _WORKDIR.value


def _run(config: Config, folder: str) -> None:
  """Does the job; JAX is imported here, so that mistakes above show at once."""
  from experiments import jobs, jobs_checkpoints

  match config.job:
    case "pretrain":
      jobs.pretrain(config, folder)
    case "generate":
      jobs.generate(config, folder)
    case "evaluate":
      jobs.evaluate(config, folder)
    case "rebalance":
      jobs.rebalance(config, folder)
    case "import":
      jobs_checkpoints.import_checkpoint(config, folder)
    case "export":
      jobs_checkpoints.export_checkpoint(config, folder)


def is_expected(error: BaseException) -> bool:
  """Whether the user can mend it: errors that our code raises, files and disks.

  A ValueError out of a library, as from a defect of ours, is not expected.
  """
  if _is_no_space(error) or isinstance(error, _FILE_ERRORS):
    return True
  if isinstance(error, flags.Error):
    return True
  if isinstance(error, FloatingPointError):  # raised by the loop alone
    return True
  if not isinstance(error, ValueError):
    return False
  frames = list(traceback.walk_tb(error.__traceback__))
  raised_in = frames[-1][0].f_globals.get("__name__", "") if frames else ""
  return raised_in.split(".")[0] in _PACKAGES


def describe(error: BaseException, folder: str | None) -> str:
  """The error in one line; `folder` is the workdir."""
  if _is_no_space(error):
    return (
      f"no space left on the disk of {folder or 'the workdir'}: free some "
      "space and give the same command again, it continues from the last whole "
      "checkpoint"
    )
  if isinstance(error, flags.Error):
    return overrides.last_line(error)
  if isinstance(error, OSError) and error.strerror:
    return f"{error.strerror}: {error.filename}"
  return " ".join(str(error).split())


def _is_no_space(error: BaseException | None) -> bool:
  """Whether it, or what caused it, is a full disk; Orbax and TensorStore wrap it."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
      return True
    if any(text in str(error).lower() for text in _NO_SPACE):
      return True
    error = error.__cause__ or error.__context__
  return False


def parse_arguments(argv: Sequence[str]) -> list[str]:
  """absl's flag parser, with one line for each mistake."""
  try:
    overrides.check_arguments(list(argv))
    return flags.FLAGS(argv)
  except (flags.Error, ValueError, TypeError, OSError) as error:
    if "--debug" in argv:
      raise
    _stop(overrides.last_line(error))


def _stop(
  line: str, code: int = 1, group: "Group | None" = None, lost: bool = False
) -> NoReturn:
  """Ends the program with one line on stderr."""
  sys.stdout.flush()
  if group:
    group.abandon(line, code, wait=0 if lost else 5)
  print(f"error: {line}", file=sys.stderr)
  sys.exit(code)


class _ProgressHandler(logging.Handler):
  """Writes log lines above the progress bar."""

  def emit(self, record: logging.LogRecord) -> None:
    tqdm.write(self.format(record), file=sys.stderr)


def _set_up_logging() -> None:
  """Our own lines as they are; those of libraries only with --debug."""
  ours = logging.getLogger("deepseek_jax")
  handler = _ProgressHandler()
  ours.handlers, ours.propagate = [handler], False
  ours.setLevel(logging.INFO)
  if not _DEBUG.value:
    # Orbax logs whole tracebacks of errors that end here as one line.
    absl_logging.set_verbosity(absl_logging.FATAL)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_arguments)
