"""Models that generate in FP8: half the bytes that decoding reads for each token.

DeepSeek-V3 report, section 3.3: weights in blocks of 128x128, quantised from those of
compute as a training step does it, activations in tiles of 1x128 as they come. Routed
experts receive codes and scales, see model/experts.py. What V3 keeps in BF16 stays so,
and what decoding absorbs: the projection from latents to keys and values.
"""

import functools
from typing import Any

import jax
from jax.sharding import Mesh

from deepseek_jax.model.layers import map_variables, quantize_for_generation
from deepseek_jax.precision.tiles import Recipe


def in_fp8(model: Any, mesh: Mesh | None = None, recipe: Recipe | None = None) -> Any:
  """The model with the weights of its Linears in FP8, for `generate` alone.

  Args:
    model: in compute precision, BF16 or FP32; on a mesh split as in compute.
    recipe: the platform's kernels and V3's tiles by default.
  """
  quantize = functools.partial(quantize_for_generation, recipe=recipe or Recipe())
  if mesh is None:
    return jax.jit(quantize)(model)
  specs = map_variables(lambda v: v.replace(v.get_metadata()["spec"]), model)
  # check_vma=False: Pallas kernels do not trace under it in interpret mode.
  split = jax.shard_map(
    quantize, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False
  )
  return jax.jit(split)(model)
