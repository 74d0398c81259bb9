"""One line on stderr when this program is ended without a word from Python.

JAX ends a process whose peers are gone from C++, with neither an exception nor
`atexit`; SIGKILL and a crash inside a driver say nothing at all. So a companion
process waits at a pipe: when the pipe closes, it prints the last line that it was told,
unless that is empty. It needs no JAX and takes a few megabytes.

Left out: a companion that is killed too, as in a container whose first process ends.
"""

import signal
import subprocess
import sys


class LastWords:
  """What to say if this process does not get to say it itself."""

  def __init__(self, line: str):
    """Starts the companion; `line` is what it would say from now on."""
    # Isolated and without site-packages, it starts in some ten milliseconds. A session
    # of its own keeps a terminal's Ctrl-C away from it.
    self._companion = subprocess.Popen(
      [sys.executable, "-I", "-S", __file__],
      stdin=subprocess.PIPE,
      stdout=subprocess.DEVNULL,
      start_new_session=True,
      text=True,
    )
    self.set(line)

  def set(self, line: str) -> None:
    """Replaces the line; an empty one says nothing."""
    pipe = self._companion.stdin
    assert pipe is not None
    pipe.write(line.replace("\n", " ") + "\n")
    pipe.flush()

  def close(self) -> None:
    """Ends the companion, which says nothing."""
    self.set("")
    self._companion.communicate()


def _speak() -> None:
  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  last = ""
  for line in sys.stdin:
    last = line.strip()
  if last:
    print(f"error: {last}", file=sys.stderr)


if __name__ == "__main__":
  _speak()
