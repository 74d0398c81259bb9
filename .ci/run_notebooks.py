"""Executes notebooks from their first cell and fails on the first error.

    python .ci/run_notebooks.py [--write] [--limit=SECONDS] PATH...

A PATH is a notebook or a folder of them. Each runs in its own folder, in a fresh
kernel of the Python that runs this program. The files stay as they are unless
`--write` asks for the outputs to be saved in them.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # this environment's kernel, not the user's
os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError


def execute(path: Path, limit: float, write: bool) -> None:
  """Runs one notebook; `limit` is in seconds for all of its cells together."""
  notebook = nbformat.read(path, as_version=4)
  deadline = time.monotonic() + limit
  client = NotebookClient(
    notebook,
    kernel_name="python3",
    timeout_func=lambda _: max(1, int(deadline - time.monotonic())),
    resources={"metadata": {"path": str(path.parent)}},
    coalesce_streams=True,
    record_timing=False,  # saved outputs change only where results do
  )
  client.execute()
  if write:
    nbformat.write(notebook, path)


def main() -> int:
  parser = argparse.ArgumentParser(description="Executes notebooks.")
  parser.add_argument("paths", nargs="+", type=Path)
  parser.add_argument("--write", action="store_true", help="save the outputs")
  parser.add_argument("--limit", type=float, default=600, help="seconds a notebook")
  options = parser.parse_args()
  found = [
    path
    for given in options.paths
    for path in (sorted(given.glob("*.ipynb")) if given.is_dir() else [given])
  ]
  if not found:
    print(f"no notebook in {', '.join(map(str, options.paths))}", file=sys.stderr)
    return 1
  for path in found:
    start = time.monotonic()
    try:
      execute(path, options.limit, options.write)
    except (CellExecutionError, CellTimeoutError, DeadKernelError, OSError) as error:
      print(f"{path}: {error}", file=sys.stderr)
      return 1
    print(f"{path}: {time.monotonic() - start:.1f} s", flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())
