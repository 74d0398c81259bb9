"""Compiles the training step for more devices than there are, and says what it takes.

    python -m experiments.benchmarks.compile_ahead --platform cuda --expert 2 8 64
    python -m experiments.benchmarks.compile_ahead --platform tpu --expert 4 8

The whole step of a pretrain variant, experts over all devices, with the kernels of that
platform: dispatch and combine included. For `cuda` one GPU of the same kind must be
present; for `tpu` libtpu is enough (`pip install -e ".[tpu]"`, JAX_PLATFORMS=cpu).
Prints seconds and bytes a device of each number of devices; nothing is run.
"""

import argparse
import dataclasses
import time

import numpy as np
from jax import ShapeDtypeStruct
from jax.experimental import topologies
from jax.sharding import Mesh

from deepseek_jax.config import MeshConfig
from deepseek_jax.mesh import make_mesh
from deepseek_jax.train import step
from experiments.configs import pretrain
from experiments.overrides import to_config

TPU_SHAPES = {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 64: "4x4x4"}


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--platform", choices=("cuda", "tpu"), default="cuda")
  parser.add_argument("--chip", default="v5p", help="of a TPU topology")
  parser.add_argument("--variant", default="h100_100m")
  parser.add_argument("--precision", nargs="+", default=["bf16", "fp8"])
  parser.add_argument("--expert", type=int, nargs="+", default=[2, 8, 64])
  parser.add_argument("--micro_batch", type=int, default=4, help="sequences a device")
  parser.add_argument("--capacity", type=float, default=1.25)
  return parser.parse_args()


def devices_of(platform: str, chip: str, number: int) -> list:
  """Devices of one fast network that need not exist.

  Raises:
    ValueError: a number of TPU chips without a shape in `TPU_SHAPES`.
  """
  if platform == "cuda":  # partitions x hosts x devices of a host
    shape = f"1x1x{number}"
    return topologies.get_topology_desc("", platform="cuda", topology=shape).devices
  if number not in TPU_SHAPES:
    raise ValueError(f"--expert {number}: use one of {sorted(TPU_SHAPES)} for TPU")
  name = f"{chip}:{TPU_SHAPES[number]}"
  return topologies.get_topology_desc(name, platform="tpu").devices[:number]


def compile_step(variant: str, precision: str, mesh: Mesh, micro: int, capacity: float):
  """The compiled step of `variant` with its experts over all of the mesh."""
  config = to_config(pretrain.get_config(variant))
  train = dataclasses.replace(
    config.train, micro_batch_size=micro, batch_size=micro * mesh.size
  )
  config = dataclasses.replace(
    config, precision=precision, train=train, mesh=MeshConfig(expert=mesh.size)
  )
  shape = (1, micro * mesh.size, train.seq_len + 1)
  tokens = ShapeDtypeStruct(shape, np.int32, sharding=step.batch_sharding(mesh))
  scalars = step.Scalars(np.float32(1e-4), np.float32(1e-3), np.float32(0.3), False)
  run = step.make_train_step(config, mesh, capacity)
  return run.lower(step.abstract_state(config, mesh), {"tokens": tokens}, scalars)


def main() -> None:
  args = parse()
  for number in args.expert:
    mesh = make_mesh(
      expert=number, devices=devices_of(args.platform, args.chip, number)
    )
    kind = mesh.devices.flat[0].device_kind
    for precision in args.precision:
      start = time.perf_counter()
      lowered = compile_step(
        args.variant, precision, mesh, args.micro_batch, args.capacity
      )
      traced = time.perf_counter() - start
      memory = lowered.compile().memory_analysis()
      seconds = time.perf_counter() - start
      print(
        f"{number:3d} x {kind}, {args.variant}, {precision}: {seconds:.0f} s "
        f"({traced:.0f} s of them tracing), state and batch "
        f"{memory.argument_size_in_bytes / 1e9:.2f} GB, temporary "
        f"{memory.temp_size_in_bytes / 1e9:.2f} GB a device",
        flush=True,
      )


if __name__ == "__main__":
  main()
