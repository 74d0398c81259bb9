"""`experiments.run` as one of several CPU processes that share compiled programs.

    python -m tests.two_processes --config=... --coordinator=... (as experiments.run)

Process 0 compiles for all, once and for every later start, as JAX can on GPUs. On CPUs
its compilation cache would not serve the others, because its keys name the process.
"""

import os
import runpy

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # as experiments.run

import jax
from jax._src import cache_key

if __name__ == "__main__":
  jax.config.update("jax_share_binary_between_hosts", True)
  cache_key._hash_accelerator_config = cache_key._hash_devices  # pyright: ignore
  runpy.run_module("experiments.run", run_name="__main__", alter_sys=True)
