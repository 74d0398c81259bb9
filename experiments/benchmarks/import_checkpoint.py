"""Seconds, GB/s and peak memory of writing and reading a checkpoint, beside the disk.

    python -m experiments.benchmarks.import_checkpoint FOLDER [--preset v2_lite]

writes a checkpoint of random BF16 weights in Hugging Face's format into FOLDER (which
must not exist), and reads it: as plain bytes, which is the disk's speed, and into
arrays on the first device. Before each reading the system's file cache is emptied, if
the user may. Each part runs in a process of its own, so that its peak memory is its
own. On a CPU, whose memory is the host's, a parameter is dropped when it is there.

`--logits` also computes logits of 128 random tokens with the imported model, into
FOLDER/ours.npz; `hf_logits.py` compares them with transformers'. `--keep` keeps FOLDER.
"""

import argparse
import dataclasses
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from deepseek_jax import presets
from deepseek_jax.io.hf_check import open_checkpoint
from deepseek_jax.io.hf_export import export_hf
from deepseek_jax.io.hf_import import (
  assemble,
  compute_targets,
  load_arrays,
  make_skeleton,
)
from deepseek_jax.io.hf_names import hf_places, our_shapes

V2_LITE = dataclasses.replace(presets.V2_LITE, yarn="always", max_seq_len=163840)
MODELS = {
  "v2_lite": V2_LITE,  # 31.4 GB
  "v2_lite_8": dataclasses.replace(V2_LITE, n_layers=8),  # 9.0 GB
  "narrow": dataclasses.replace(  # 0.2 GB
    V2_LITE,
    vocab_size=4096,
    dim=512,
    inter_dim=1024,
    moe_inter_dim=128,
    n_heads=4,
    n_routed_experts=16,
    kv_lora_rank=128,
  ),
}
TOKENS = 128
FLOOR = np.uint16(0x3B00)  # BF16 of 2**-9


class RandomWeights:
  """An array that is drawn when a part of it is asked for.

  Random bits are the sign, the mantissa and the lowest bit of the exponent of BF16:
  +-[2**-9, 2**-7), rms 0.005. The embedding is 64 times larger, so that each layer adds
  a little to what flows by, as in a trained model. Gains of norms are ones.
  """

  dtype = np.dtype(ml_dtypes.bfloat16)

  def __init__(self, path: str, shape: tuple[int, ...]):
    self.path, self.shape = path, shape

  def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
    shape = self.shape[len(index) :]
    if "norm" in self.path:
      return np.ones(shape, self.dtype)
    seed = zlib.crc32(f"{self.path}{index}".encode())
    generator = np.random.Generator(np.random.SFC64(seed))
    bits = np.frombuffer(generator.bytes(2 * math.prod(shape)), np.uint16)
    bits = bits & np.uint16(0x80FF)
    bits |= FLOOR + (np.uint16(6 << 7) if "embed" in self.path else np.uint16(0))
    return bits.view(self.dtype).reshape(shape)


def make(folder: Path, preset: str) -> dict:
  """Writes the checkpoint."""
  config = MODELS[preset]
  places = hf_places(config)
  shapes = our_shapes(places.values())
  arrays = {path: RandomWeights(path, shape) for path, shape in shapes.items()}
  start = time.perf_counter()
  export_hf(arrays, config, folder, progress=False)
  return report("write", folder, start) | {
    "parameters": sum(math.prod(shape) for shape in shapes.values())
  }


def read_plainly(folder: Path) -> dict:
  """Reads the files' bytes, 16 MB at a time, into one buffer."""
  empty_cache()
  buffer = bytearray(1 << 24)
  start = time.perf_counter()
  for path in sorted(folder.glob("*.safetensors")):
    with path.open("rb", buffering=0) as file:
      while file.readinto(buffer):
        pass
  return report("plain read", folder, start)


def read(folder: Path) -> dict:
  """Imports the checkpoint, all at once, or a parameter at a time on a CPU."""
  on_cpu = jax.default_backend() == "cpu"
  jax.block_until_ready(jnp.zeros(1))  # the device's own start is not reading
  empty_cache()
  before = peak_memory()
  start = time.perf_counter()
  source = open_checkpoint(folder)
  skeleton = make_skeleton(source.config)
  targets = compute_targets(skeleton, None, jnp.bfloat16)
  if on_cpu:
    for path, target in targets.items():
      jax.block_until_ready(load_arrays(source, {path: target}, progress=False))
    arrays = None
  else:
    arrays = load_arrays(source, targets, progress=False)
    jax.block_until_ready(arrays)
  found = report("import", folder, start)
  largest = max(math.prod(t.shape) * t.dtype.itemsize for t in targets.values())
  found |= {
    "peak_GB_before": before,
    "largest_parameter_GB": largest / 1e9,
    "bound_GB": 2 * largest / 1e9 + 1,
  }
  if "--logits" in sys.argv:
    arrays = arrays or load_arrays(source, targets, progress=False)
    model = assemble(skeleton, arrays)
    ids = np.random.default_rng(0).integers(0, source.config.vocab_size, (1, TOKENS))
    start = time.perf_counter()
    logits = np.asarray(jax.jit(lambda m, t: m.logits(t))(model, ids), np.float32)
    np.savez(folder / "ours.npz", ids=ids, logits=logits)
    found["logits_seconds"] = time.perf_counter() - start
  return found


def report(part: str, folder: Path, start: float) -> dict:
  seconds = time.perf_counter() - start
  size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
  return {
    "part": part,
    "GB": size / 1e9,
    "seconds": seconds,
    "GB_per_s": size / 1e9 / seconds,
    "peak_GB": peak_memory(),
  }


def peak_memory() -> float:
  """GB that this process held at most, without mapped files that it gave back."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def empty_cache() -> None:
  """Makes the next reading come from the disk, where the user may."""
  os.sync()
  try:
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
  except OSError as error:
    print(f"the file cache is not emptied ({error.strerror})", file=sys.stderr)


def main() -> None:
  parser = argparse.ArgumentParser(description="Times writing and reading a checkpoint")
  parser.add_argument("folder", type=Path)
  parser.add_argument("--preset", choices=list(MODELS), default="v2_lite_8")
  parser.add_argument("--logits", action="store_true")
  parser.add_argument("--keep", action="store_true")
  parser.add_argument("--part", choices=("make", "read", "plain"))
  args = parser.parse_args()
  if args.part:
    done = {
      "make": lambda: make(args.folder, args.preset),
      "read": lambda: read(args.folder),
      "plain": lambda: read_plainly(args.folder),
    }[args.part]()
    print(json.dumps(done))
    return
  try:
    for part in ("make", "plain", "read"):
      environment = dict(os.environ)
      if part == "make":
        environment["JAX_PLATFORMS"] = "cpu"
      command = [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--part", part]
      subprocess.run(command, check=True, env=environment)
  finally:
    if not args.keep:
      shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
  main()
