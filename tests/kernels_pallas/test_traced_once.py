"""What a training step wants of kernels: lowered, and so compiled, once wherever it
calls them; without effects, which its transformations refuse."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.fp8_matmul import gpu
from kernels_pallas.grouped_matmul import gpu as grouped
from kernels_pallas.grouped_matmul import gpu_fp8
from kernels_pallas.quantize import gpu as quantize

SIZE = 128  # of everything, so that forward and backward take the same kernels


@jax.custom_vjp
def linear(x_MK, codes_NK, scales_nk):
  rows = quantize.quantize_rows(x_MK, False, jnp.float8_e4m3fn)
  return gpu.multiply(*rows, codes_NK[None], scales_nk[None])


def _forward(x_MK, *w):
  return linear(x_MK, *w), w


def _backward(w, dy_MN):
  return linear(dy_MN, *w), None, None


linear.defvjp(_forward, _backward)


def test_one_kernel_a_shape_wherever_it_is_called():
  """A layer by itself, and recomputed layers in a loop, forward and backward."""

  def loss(x_MK, *w):
    def layer(x_MK, _):
      return jax.checkpoint(linear)(x_MK, *w), None

    y_MN, _ = jax.lax.scan(layer, linear(x_MK, *w), None, length=3)
    return y_MN.astype(jnp.float32).sum()

  mesh = Mesh(np.array(jax.devices()[:1]), "device")
  step = jax.shard_map(
    jax.grad(loss), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
  )
  shapes = [
    jax.ShapeDtypeStruct((SIZE, SIZE), jnp.bfloat16),
    jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float8_e4m3fn),
    jax.ShapeDtypeStruct((1, 1), jnp.float32),
  ]
  text = jax.jit(step).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
  hashes = re.findall(r'kernel_hash = "([^"]*)"', text)
  assert len(hashes) > 2
  assert len(set(hashes)) == 2  # one quantises, one multiplies


def test_kernels_have_no_effects():
  """Those that write in place, or count, would have one by jax.new_ref."""
  f32, codes = jnp.float32, jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float8_e4m3fn)
  scales, c = (jax.ShapeDtypeStruct(s, f32) for s in ((1, SIZE), (1, SIZE, SIZE)))
  x = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.bfloat16)
  sizes, pair = jax.ShapeDtypeStruct((1,), jnp.int32), (codes, scales)
  for function, *args in (
    (lambda x: quantize.quantize_both(x, False, jnp.float8_e4m3fn), x),
    (lambda *a: gpu.multiply_tokens(*a[:4], None, a[4]), *pair, *pair, c),
    (gpu_fp8.multiply_rows, *pair, *pair, sizes, c),
    (lambda *a: grouped.multiply_rows(*a[:3], f32, a[3]), x, x, sizes, c),
  ):
    assert not jax.jit(function).trace(*args).jaxpr.effects
