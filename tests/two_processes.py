"""`experiments.run` as one of several CPU processes that share compiled programs.

    python -m tests.two_processes --config=... --coordinator=... (as experiments.run)

JAX's compilation cache is written by process 0 alone, and on CPUs its keys name the
process, so that the others would compile anew each time they start. Without that part
of the key they find what process 0 has compiled.
"""

import runpy

from jax._src import cache_key

if __name__ == "__main__":
  cache_key._hash_accelerator_config = cache_key._hash_devices  # pyright: ignore
  runpy.run_module("experiments.run", run_name="__main__", alter_sys=True)
