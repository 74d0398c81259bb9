"""SIGTERM and Ctrl-C as a wish to stop after the step under way.

Several processes must stop at the same step. JAX's preemption service agrees on one:
it catches SIGTERM in any of them, within a second. Ctrl-C is passed on to it.
"""

import logging
import os
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
    if not multihost_utils.reached_preemption_sync_point(step):
      return False
    log.warning("a process was told to stop: stopping all, with a checkpoint")
    return True

  def __enter__(self) -> "Interrupt":
    alone = jax.process_count() == 1
    if threading.current_thread() is threading.main_thread():
      for number in _SIGNALS if alone else (signal.SIGINT,):
        handler = self._note if alone else self._pass_on
        self._before[number] = signal.signal(number, handler)
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

  def _pass_on(self, *_: Any) -> None:
    """Ctrl-C as the SIGTERM that JAX's service waits for."""
    self.__exit__()
    os.kill(os.getpid(), signal.SIGTERM)
