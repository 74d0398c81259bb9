"""FP8 operands: how a recipe makes them and multiplies them (V3 report, 3.3.2).

The products want the contracted dimension last, so an operand that is contracted in
two ways exists twice: activations as rows (1x128 along channels) and as columns (128x1
along tokens, transposed), weights with their input or their output last.

Shape suffixes: M tokens, K input, N output, W matrices, Z rows, F hidden; a lower-case
letter is that dimension divided by 128. Scales of activations have the tile first.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.fp8_config import Fp8Config
from deepseek_jax.precision import emulation
from kernels_pallas import quantize
from kernels_pallas.fp8_matmul import fp8_matmul, fp8_matmul_dw
from kernels_pallas.grouped_matmul import (
  grouped_fp8_matmul,
  grouped_fp8_matmul_dw,
  masked_fp8_matmul,
)

TILE = quantize.TILE
Tiled = tuple[jax.Array, jax.Array]  # FP8 codes, FP32 scale of each tile
# Contracted over the input, and for gradients over the output.
WeightCodes = tuple[Tiled, Tiled | None]


@dataclasses.dataclass(frozen=True)
class Recipe:
  """An `Fp8Config` and who computes it: the platform's kernels, or the emulation.

  `num_sms` leaves a GPU's other multiprocessors free, for a transfer beside products.
  """

  config: Fp8Config = dataclasses.field(default_factory=Fp8Config)
  emulated: bool = False
  num_sms: int | None = None  # None: all

  def multiply(
    self, a: Tiled, b: Tiled, dtype, group_sizes_E: jax.Array | None = None
  ) -> jax.Array:
    """a b^T: rows [M, K] times a weight [N, K], or [E, N, K] by groups of rows."""
    if self.emulated:
      promotion = self.config.promotion
      return emulation.multiply(a, b, group_sizes_E, promotion).astype(dtype)
    options = {"out_dtype": dtype, "num_sms": self.num_sms}
    if group_sizes_E is None:
      return fp8_matmul(*a, *b, **options)
    return grouped_fp8_matmul(*a, *b, group_sizes_E, **options)

  def multiply_masked(
    self, a: Tiled, b: Tiled, counts_G: jax.Array, dtype
  ) -> jax.Array:
    """Groups of one capacity: the first counts_G rows of each times its weight.

    Rows [G, C, K] with scales [k, G, C] times weights [G, N, K]: [G, C, N], 0 in rows
    from a group's count on, whatever stands there.
    """
    if self.emulated:
      y_GCN = emulation.multiply_masked(a, b, counts_G, self.config.promotion)
      return y_GCN.astype(dtype)
    return masked_fp8_matmul(*a, *b, counts_G, out_dtype=dtype)

  def weight_gradient(
    self, a: Tiled, b: Tiled, group_sizes_E: jax.Array | None = None
  ) -> jax.Array:
    """a b^T over tokens in FP32: columns [I, M], [J, M] to [I, J] or [E, I, J]."""
    if self.emulated:
      return emulation.weight_gradient(a, b, group_sizes_E, self.config.promotion)
    if group_sizes_E is None:
      return fp8_matmul_dw(*a, *b, num_sms=self.num_sms)
    return grouped_fp8_matmul_dw(*a, *b, group_sizes_E, num_sms=self.num_sms)

  @property
  def quantizer(self) -> str | None:
    """The implementation of the quantisers."""
    return "reference" if self.emulated else None

  @property
  def _options(self) -> dict[str, Any]:
    return {"impl": self.quantizer, "num_sms": self.num_sms}

  def rows(self, x_MK: jax.Array, power_of_two: bool = False) -> Tiled:
    """Activations contracted over channels: codes [M, K], scales [k, M]."""
    if self.config.scales == "tensor":
      return _whole(x_MK)
    return quantize.quantize_rows(
      x_MK, power_of_two=self._power(power_of_two), **self._options
    )

  def columns(self, x_MK: jax.Array, power_of_two: bool = False) -> Tiled:
    """Activations contracted over tokens: codes [K, M], scales [m, K]."""
    if self.config.scales == "tensor":
      return _whole(x_MK.T)
    return quantize.quantize_columns(
      x_MK, power_of_two=self._power(power_of_two), **self._options
    )

  def gradient(self, dy_MN: jax.Array) -> tuple[Tiled, Tiled]:
    """The gradient of an output, as rows and as columns."""
    c, dtype = self.config, self._gradient_dtype
    if c.scales == "tensor":
      return _whole(dy_MN, dtype), _whole(dy_MN.T, dtype)
    if c.gradient_tiles == "128x128":
      return _blocks(dy_MN, dtype), _blocks(dy_MN.T, dtype)
    return quantize.quantize_both(
      dy_MN, power_of_two=self._power(False), dtype=dtype, **self._options
    )

  def gradient_rows(self, dy_MN: jax.Array) -> Tiled:
    """The gradient of an output as rows that will be tiled again as columns."""
    c, dtype = self.config, self._gradient_dtype
    if c.scales == "tensor":
      return _whole(dy_MN, dtype)
    if c.gradient_tiles == "128x128":
      return _blocks(dy_MN, dtype)
    return quantize.quantize_rows(
      dy_MN, power_of_two=True, dtype=dtype, **self._options
    )

  def tile_again(self, rows: Tiled, gradient: bool = False) -> Tiled:
    """Columns of what was kept or sent as rows, in the same FP8 format.

    Args:
      gradient: whether it came from `gradient_rows`.
    """
    c, dtype = self.config, rows[0].dtype
    if c.scales == "tensor":
      return _whole(quantize.dequantize_rows(*rows).T, dtype)
    if c.gradient_tiles == "128x128" and gradient:
      return _blocks(quantize.dequantize_rows(*rows).T, dtype)
    return quantize.requantize_columns(
      *rows, power_of_two=True, dtype=dtype, **self._options
    )

  def activate(self, hidden_Z2F: jax.Array, gates_Z: jax.Array | None) -> Tiled:
    """silu(gate half) * up half * gates, FP32 up to the rows that it becomes."""
    if self.emulated:
      return self.rows(_gated(hidden_Z2F.astype(jnp.float32), gates_Z))
    power_of_two = self._power(False)
    return quantize.swiglu_quantize(  # pyright: ignore[reportReturnType]
      hidden_Z2F, gates_Z, power_of_two=power_of_two, num_sms=self.num_sms
    )

  def activate_and_keep(
    self, hidden_Z2F: jax.Array, gates_Z: jax.Array | None
  ) -> tuple[Tiled, Tiled]:
    """`activate`, and rows of its input for `activate_backward`, read only once."""
    if self.emulated:
      kept = self.rows(hidden_Z2F, power_of_two=True)
      return self.activate(hidden_Z2F, gates_Z), kept
    power_of_two = self._power(False)
    return quantize.swiglu_quantize(  # pyright: ignore[reportReturnType]
      hidden_Z2F,
      gates_Z,
      with_h=True,
      power_of_two=power_of_two,
      num_sms=self.num_sms,
    )

  def activate_backward(
    self, hidden: Tiled, gates_Z: jax.Array | None, dy_ZF: jax.Array
  ) -> tuple[tuple[Tiled, Tiled], Tiled, jax.Array | None]:
    """From rows of `activate`'s input and the gradient of its output.

    Returns:
      The input's gradient as rows and columns, the output computed again as columns,
      and the gradient of the gates.
    """
    if self.emulated:
      wide = quantize.dequantize_rows(*hidden)
      y_ZF, pull = jax.vjp(_gated, wide, gates_Z)
      d_hidden, d_gates_Z = pull(dy_ZF.astype(jnp.float32))
      return self.gradient(d_hidden), self.columns(y_ZF), d_gates_Z
    out = quantize.swiglu_quantize_backward(
      hidden,
      gates_Z,
      dy_ZF,
      with_y=True,
      power_of_two=self._power(False),
      num_sms=self.num_sms,
    )
    assert out.y_columns is not None
    return (out.dh_rows, out.dh_columns), out.y_columns, out.dgate_Z

  def weights(self, w_WKN: jax.Array) -> tuple[Tiled, Tiled]:
    """Of matrices [K, N]: codes [W, K, N] and [W, N, K], scales of their blocks."""
    if self.config.scales == "tensor":
      return jax.vmap(_whole_weight)(w_WKN)
    return quantize.quantize_blocks(
      w_WKN, power_of_two=self._power(False), **self._options
    )

  @property
  def _gradient_dtype(self):
    e5m2 = self.config.gradient_format == "e5m2"
    return jnp.float8_e5m2 if e5m2 else jnp.float8_e4m3fn

  def _power(self, power_of_two: bool) -> bool:
    return power_of_two or self.config.power_of_two_scales


def _gated(hidden_Z2F: jax.Array, gates_Z: jax.Array | None) -> jax.Array:
  gate, up = jnp.split(hidden_Z2F, 2, axis=-1)
  y_ZF = jax.nn.silu(gate) * up
  return y_ZF if gates_Z is None else y_ZF * gates_Z[:, None]


def _tiles(n: int) -> int:
  return -(-n // TILE)


def _whole(x_MK: jax.Array, dtype=jnp.float8_e4m3fn) -> Tiled:
  """One scale for all, written as often as tiles are expected to have one."""
  codes, scale = quantize.quantize_tensor(x_MK, dtype=dtype)
  m, k = x_MK.shape
  return codes, jnp.full((_tiles(k), m), scale)


def _whole_weight(w_KN: jax.Array) -> tuple[Tiled, Tiled]:
  codes, scale = quantize.quantize_tensor(w_KN)
  scales = jnp.full((_tiles(w_KN.shape[0]), _tiles(w_KN.shape[1])), scale)
  return (codes, scales), (codes.T, scales.T)


def _blocks(x_MK: jax.Array, dtype) -> Tiled:
  """One scale for 128x128 values, in the form of rows."""
  (codes, scales_mk), _ = quantize.quantize_blocks(x_MK, dtype=dtype, impl="reference")
  return codes, jnp.repeat(scales_mk, TILE, axis=0)[: x_MK.shape[0]].T


def keep[T](parts: T, name: str) -> T:
  """Names arrays that recomputation may keep, as `checkpoint_name`, FP8 codes as bits.

  JAX rounds kept floats to their own type once more, by `reduce_precision`, which takes
  E4M3's largest exponent for infinity: codes above 240 would come back as NaN.
  """

  def keep_one(x):
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize > 1:
      return checkpoint_name(x, name)
    bits = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint8), name)
    return jax.lax.bitcast_convert_type(bits, x.dtype)

  return jax.tree.map(keep_one, parts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Fp8Weight:
  """A weight of a Linear, quantised once a step, in both layouts.

  Autodiff wants cotangents of a primal's own type, and FP8 gradients are not meant, so
  `gradient` stands for the weight there: zeros that nobody reads, of the weight's
  shape, in the FP32 in which weight gradients are accumulated.

  Generation needs one layout only, see `forward_only`.
  """

  gradient: jax.Array | None  # FP32 [..., in..., out...]
  by_output: Tiled  # [..., N, K]: contracted over the input, for the product
  by_input: Tiled | None  # [..., K, N]: contracted over the output, for x's gradient
  recipe: Recipe = dataclasses.field(metadata={"static": True})
  body: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # in..., out...

  def __getitem__(self, everything) -> "Fp8Weight":
    if everything is not Ellipsis:
      raise TypeError("an FP8 weight has no parts: quantise the part")
    return self

  @property
  def codes(self) -> WeightCodes:
    return self.by_output, self.by_input

  @property
  def shape(self) -> tuple[int, ...]:
    return *self.by_output[0].shape[:-2], *self.body

  def forward_only(self) -> "Fp8Weight":
    """Without what gradients need: one byte a weight instead of six."""
    return dataclasses.replace(self, gradient=None, by_input=None)


def quantize_weight(
  w: jax.Array, inputs: int, outputs: int, recipe: Recipe
) -> Fp8Weight:
  """Quantises weights [..., in..., out...] of so many input and output dimensions."""
  lead = w.shape[: w.ndim - inputs - outputs]
  k = math.prod(w.shape[len(lead) : len(lead) + inputs])
  both = recipe.weights(w.reshape(math.prod(lead), k, -1))
  by_input, by_output = jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), both)
  zeros, body = jnp.zeros(w.shape, jnp.float32), w.shape[len(lead) :]
  return Fp8Weight(zeros, by_output, by_input, recipe, body)
