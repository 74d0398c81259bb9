"""What every test may count on: eight CPU devices and a warm compilation cache.

Eight simulated devices appear where the default backend is the CPU. Single-device
tests use the first; those that need a mesh pass `devices=jax.devices()[:n]`. The
setting is made through JAX's configuration, not through XLA_FLAGS, so that programs
started by a test see one device as a user would. Nothing here chooses the backend:
on a GPU machine the suite runs on the GPU, and `JAX_PLATFORMS=cpu make test` on the
CPU.

Compiled programs are kept under `.pytest_cache`; the environment variable carries the
cache to programs started by a test. `make clean` removes it.
"""

import gc
import os
from pathlib import Path

# Nearly all the time of the suite is LLVM's: on CPUs its optimisation is left out,
# also in programs that tests start. Set before JAX reads its flags.
if not Path("/dev/nvidiactl").exists():
  os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + os.environ.get(
    "XLA_FLAGS", ""
  )

# Several workers that each take most of a GPU's memory would leave it to the first.
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest

HAS_GPU = Path("/dev/nvidiactl").exists()
LONG = ("experiments", "train")  # folders of the files that take longest

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
  jax.config.update("jax_num_cpu_devices", 8)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
  """One worker on a GPU, whose memory each would take most of; None: one a core."""
  return 1 if HAS_GPU and os.environ.get("JAX_PLATFORMS") != "cpu" else None


def pytest_collection_finish() -> None:
  """Tracing makes objects by the million: looking through them often takes 3.5%."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(200_000, 20, 100)


def pytest_configure(config: pytest.Config) -> None:
  cache = getattr(config, "cache", None)
  if cache is None or "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  settings = {
    "jax_compilation_cache_dir": str(cache.mkdir("jax")),
    "jax_persistent_cache_min_compile_time_secs": 0.5,
    "jax_compilation_cache_max_size": 2 * 2**30,  # bytes; also locks the folder
  }
  for name, value in settings.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  # Long files first, so that no worker is left with one while the others are done.
  items.sort(key=lambda item: item.path.parent.name not in LONG)
  gpu_items = [item for item in items if item.get_closest_marker("gpu")]
  if gpu_items and jax.default_backend() != "gpu":
    for item in gpu_items:
      item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
