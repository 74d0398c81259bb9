"""SIGTERM and Ctrl-C as a wish to stop after the step under way."""

import logging
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

log = logging.getLogger("deepseek_jax")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
  """While entered, the first SIGTERM or Ctrl-C is noted; a second one acts as usual.

  In a thread other than the main one, where signals cannot be caught, it does nothing.
  """

  def __init__(self):
    self._noted = False
    self._before: dict[int, Any] = {}

  def requested(self, step: int) -> bool:
    """Whether to stop before `step`; the same answer in all processes."""
    if jax.process_count() == 1:
      return self._noted
    return self._noted or multihost_utils.reached_preemption_sync_point(step)

  def __enter__(self) -> "Interrupt":
    # With several processes JAX's own service catches SIGTERM and agrees on a step.
    if threading.current_thread() is threading.main_thread():
      for number in _SIGNALS if jax.process_count() == 1 else ():
        self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}

  def _note(self, number: int, _: Any) -> None:
    self._noted = True
    log.warning(
      "%s: stopping after this step, with a checkpoint", signal.Signals(number).name
    )
    self.__exit__()
