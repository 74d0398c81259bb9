"""What is said when a process ends, and when it does not get to say anything."""

import signal
import subprocess
import sys

import pytest

from tests.small_runs import ROOT

PROGRAM = """
import os, signal, sys
from deepseek_jax.last_words import LastWords
words = LastWords("too early")
words.set("two\\nlines")
{end}
"""


def _stderr(end: str) -> str:
  program = PROGRAM.format(end=end)
  ran = subprocess.run(
    [sys.executable, "-c", program],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert ran.stdout == ""
  return ran.stderr


@pytest.mark.parametrize(
  "end", ["os._exit(1)", "os.abort()", "os.kill(os.getpid(), signal.SIGKILL)"]
)
def test_a_process_that_ends_without_a_word_has_one(end):
  assert _stderr(end) == "error: two lines\n"


def test_nothing_is_said_of_a_process_that_leaves():
  assert _stderr("words.close()") == ""


def test_signals_to_the_whole_group_do_not_silence_it():
  end = f"os.kill(words._companion.pid, {int(signal.SIGTERM)}); os._exit(1)"
  assert _stderr("import time; time.sleep(1); " + end) == "error: two lines\n"
