"""Arithmetic of the Hopper kernels: codes and scales to the last bit, on registers.

A division here is only good to 2 units in the last place: on an H100 scales came out
one unit off. So quotients are made from a reciprocal and corrected by their remainder,
which a fused multiply-add gives exactly (Markstein 1990): three instructions for each
x / s.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith
from jax.extend.mlir.dialects import math as mlir_math

from kernels_pallas.quantize import reference

STEP = 32  # rows of the arrays in registers

# A warp holds 8 of the 32 rows; lanes, 4 to a row, hold pairs of neighbours.
LAYOUT = plgpu.Layout.TILED(
  plgpu.Tiling(((STEP, 8), (8, 8), (2,))),
  warp_dims=(-5,),
  lane_dims=(-3, -2),
  vector_dim=-1,
)
BY_ROW, BY_COLUMN = LAYOUT.reduce(1), LAYOUT.reduce(0)  # one value for each


@dataclasses.dataclass(frozen=True)
class Codes:
  """How codes are made."""

  dtype: Any
  power_of_two: bool
  interpreted: bool  # on a machine without a GPU

  @property
  def limit(self) -> float:
    return float(jnp.finfo(self.dtype).max)


def amax(x: jax.Array, axis: int, codes: Codes) -> jax.Array:
  """The largest magnitude along an axis, or NaN."""
  if codes.interpreted:  # XLA's maximum of floats can lose a NaN on CPU
    return reference.amax(x, axis)
  return jnp.max(jnp.abs(x), axis=axis)


def scales(magnitude: jax.Array, codes: Codes, layout=BY_ROW) -> jax.Array:
  """reference.scales, of a vector in this layout."""
  if codes.interpreted:
    return reference.scales(magnitude, codes.limit, codes.power_of_two)
  amax = jnp.maximum(magnitude, reference.MIN_AMAX)
  reciprocal = float(np.float32(1) / np.float32(codes.limit))
  s = amax * reciprocal
  excess = _fused_multiply_add(s, codes.limit, -amax, layout)
  s = _fused_multiply_add(excess, -reciprocal, s, layout)
  return reference.finish_scales(s, magnitude, codes.power_of_two)


def reciprocals(s: jax.Array, codes: Codes) -> jax.Array:
  """1 / s for scales of rows, rounded once."""
  if codes.interpreted:
    return s  # divide() has no use for it
  r = 1.0 / s
  excess = _fused_multiply_add(r, s, -1.0, BY_ROW)
  return _fused_multiply_add(excess, -r, r, BY_ROW)


def divide(
  x: jax.Array, s: jax.Array, reciprocal: jax.Array, codes: Codes
) -> jax.Array:
  """x / s for each row, rounded once; a zero keeps its sign."""

  def spread(of_rows):
    return lax.broadcast_in_dim(of_rows, x.shape, (0,))

  if codes.interpreted:
    return reference.divide(x, spread(s))
  q = x * spread(reciprocal)
  if codes.power_of_two:
    return q
  excess = _fused_multiply_add(q, spread(s), -x, LAYOUT)
  return _fused_multiply_add(excess, spread(-reciprocal), q, LAYOUT)


def _fused_multiply_add(
  a: jax.Array, b: jax.Array | float, c: jax.Array | float, layout
) -> jax.Array:
  """a * b + c rounded once; jnp has no such operation.

  Constants are given as floats: a constant array has no layout, which goes unnoticed
  until the kernel is compiled on a GPU. For the same reason an array spread from a
  scalar needs `layout_cast` before it comes here.
  """
  arrays = [x for x in (a, b, c) if not isinstance(x, float)]

  @plgpu.inline_mgpu(
    arg_types=(layout,) * len(arrays),
    return_type=plgpu.ShapeDtypeStruct(a.shape, jnp.dtype(jnp.float32), layout=layout),
  )
  def fma(_, *values):
    def on_registers(*registers):
      given = iter(registers)
      kind = registers[0].type
      operands = [
        _constant(kind, x) if isinstance(x, float) else next(given) for x in (a, b, c)
      ]
      return mlir_math.fma(*operands)

    return values[0]._pointwise(on_registers, *values[1:])

  return fma(*arrays)  # pyright: ignore[reportCallIssue]


def _constant(kind: ir.Type, value: float) -> ir.Value:
  attribute = ir.FloatAttr.get(ir.F32Type.get(), value)
  if isinstance(kind, ir.VectorType):
    attribute = ir.DenseElementsAttr.get_splat(kind, attribute)
  return arith.constant(kind, attribute)
