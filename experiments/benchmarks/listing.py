"""What NVIDIA's assembler says of the products' kernels; nothing is run or timed.

    python -m experiments.benchmarks.listing [--target h200.txtpb] [--kernels dw]

Registers are scarce in these loops. Where they do not suffice, the assembler spills
sums to memory or has each product of the tensor cores waited for ("serialized"), and a
kernel takes three times as long. Whether it does can turn on one instruction, so this
is the first thing to look at after a change of the loop or of a tiling.

Needs `pip install -e ".[gpu]"`, whose ptxas is used where none is on the PATH, and a
GPU, or with JAX_PLATFORMS=cpu instead of it XLA's description of one
(xla/backends/gpu/target_config/specs in openxla/xla). Each kernel is compiled in a
process of its own, because Mosaic GPU writes what it makes to the standard output.
"""

import argparse
import functools
import glob
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent import futures
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.benchmarks.fp8_matmul import SHAPES
from kernels_pallas.fp8_matmul import gpu
from kernels_pallas.grouped_matmul import gpu as gpu_bf16
from kernels_pallas.grouped_matmul import gpu_fp8

TOKENS = 4096
FEW = (64, 128)
GROUPS = (8, 32)
EXPERT_SHAPES = [(4096, 7168), (7168, 2048), (7168, 4096), (2048, 7168)]


def spec(*shape, dtype=jnp.float8_e4m3fn):
  return jax.ShapeDtypeStruct(shape, dtype)


def scales(*shape):
  return spec(*shape, dtype=jnp.float32)


def rows_specs(m, n, k, groups=1):
  """Rows, matrices and their scales."""
  n_, k_ = -(-n // 128), -(-k // 128)
  return spec(m, k), scales(k_, m), spec(groups, n, k), scales(groups, n_, k_)


def token_specs(m, n, k):
  m_ = -(-m // 128)
  return spec(n, m), scales(m_, n), spec(k, m), scales(m_, k)


def bf16_kernels(groups, rows, d, f) -> dict:
  """The three products of experts in BF16."""
  x, dy = (spec(rows, width, dtype=jnp.bfloat16) for width in (d, f))
  w, sizes = spec(groups, d, f, dtype=jnp.bfloat16), spec(groups, dtype=jnp.int32)
  dx = functools.partial(gpu_bf16.multiply, transpose_w=True)
  dw = functools.partial(gpu_bf16.multiply_rows, dtype=jnp.bfloat16)
  name = f"{groups} BF16 groups"
  return {
    f"{name} {d},{f}": (gpu_bf16.multiply, (x, w, sizes)),
    f"{name} dx {d},{f}": (dx, (dy, w, sizes)),
    f"{name} dw {d},{f}": (dw, (x, dy, sizes)),
  }


def kernels() -> dict:
  """By name, a function and what it is traced with."""
  found = {}
  for n, k in SHAPES:
    found[f"rows {n},{k}"] = gpu.multiply, rows_specs(TOKENS, n, k)
    found[f"dgrad {k},{n}"] = gpu.multiply, rows_specs(TOKENS, k, n)
    found[f"dw {n},{k}"] = gpu.multiply_tokens, token_specs(TOKENS, n, k)
    for few in FEW:
      found[f"{few} rows {n},{k}"] = gpu.multiply, rows_specs(few, n, k)
  for e in GROUPS:
    sizes, rows = spec(e, dtype=jnp.int32), 8 * TOKENS
    for n, k in EXPERT_SHAPES:
      args = (*rows_specs(rows, n, k, e), sizes)
      found[f"{e} groups {n},{k}"] = gpu_fp8.multiply, args
      args = (*token_specs(rows, n, k), sizes)
      found[f"{e} groups dw {n},{k}"] = gpu_fp8.multiply_rows, args
      found |= bf16_kernels(e, rows, k, n)
  return found


def compile_one(name: str, target: str | None):
  """Compiles a kernel; Mosaic GPU prints it."""
  from jax.experimental import topologies

  function, args = kernels()[name]
  device = jax.devices()[0]
  if target:
    topology = {"target_config": Path(target).read_text(), "topology": "1x1x1"}
    device = topologies.get_topology_desc("", "cuda", **topology).devices[0]
  sharding = jax.sharding.SingleDeviceSharding(device)
  args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in args]
  jax.jit(function).lower(*args).compile()


def assembler() -> str:
  """The path of ptxas.

  Raises:
    FileNotFoundError: neither on the PATH nor among NVIDIA's Python packages.
  """
  if found := shutil.which("ptxas"):
    return found
  package = importlib.util.find_spec("nvidia")
  for folder in (package and package.submodule_search_locations) or ():
    if found := glob.glob(f"{folder}/*/bin/ptxas"):
      return found[0]
  raise FileNotFoundError('no ptxas: pip install -e ".[gpu]" brings one')


def listing(name: str, target: str | None = None) -> tuple[int, bool]:
  """Bytes that a kernel spills, and whether its products are waited for one by one.

  Raises:
    RuntimeError: it was not compiled; with the compiler's last words.
  """
  command = [sys.executable, "-m", __spec__.name, "--one", name]
  command += ["--target", target] if target else []
  environment = os.environ | {
    "MOSAIC_GPU_DUMP_PTX": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "0",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several share a GPU
  }
  ran = subprocess.run(command, env=environment, capture_output=True, text=True)
  start = ran.stdout.find(".version")
  if ran.returncode or start < 0:
    raise RuntimeError(f"{name}: {(ran.stderr or ran.stdout).strip()[-500:]}")
  with tempfile.TemporaryDirectory() as folder:
    source = Path(folder, "kernel.ptx")
    source.write_text(ran.stdout[start:])
    command = [assembler(), "-arch=sm_90a", "-v", source, "-o", Path(folder, "out")]
    said = subprocess.run(command, capture_output=True, text=True)
  spilled = re.findall(r"(\d+) bytes spill stores", said.stderr)
  if said.returncode or not spilled:
    raise RuntimeError(f"{name}: {said.stderr.strip()[-500:]}")
  return sum(map(int, spilled)), "serialized" in said.stderr


def main():
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--target", help="XLA's description of a GPU that is not there")
  parser.add_argument(
    "--kernels", default="", help="only those with this in their name"
  )
  parser.add_argument("--jobs", type=int, default=os.cpu_count())
  parser.add_argument("--one", help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.one:
    compile_one(flags.one, flags.target)
    return
  names = [name for name in kernels() if flags.kernels in name]
  with futures.ThreadPoolExecutor(flags.jobs) as pool:
    results = pool.map(lambda name: listing(name, flags.target), names)
    for name, (spilled, serialized) in zip(names, results):
      waits = "products waited for one by one" if serialized else ""
      print(f"{name:28s} {spilled:5d} bytes spilled  {waits}", flush=True)


if __name__ == "__main__":
  main()
