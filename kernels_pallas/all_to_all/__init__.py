"""Rows to other devices and back: the all-to-all of expert parallelism.

DeepSeek-V3 report, 3.2.2; DeepEP (github.com/deepseek-ai/DeepEP). A route says where
each token's copies go; `dispatch` sends them, `combine` brings rows home and sums them
in FP32, without weights: gates are the experts' business, so each is the other's
transpose, and differentiates as such.

    route = plan_ranks(experts_MA // experts_per_rank, rows, axis)     # training
    route = plan_experts(experts_MA, experts_per_rank, capacity, axis)  # decoding
    y_CD, gates_CA = dispatch((x_MD, gates_MA), route)  # one array or several
    out_MD = combine(y_CD, route)  # with nothing between: x times its copies

`send_rows` is the transport below them, for FP8 codes and scales. An axis may be several
axes of the mesh: then it is all their devices, in the order of the names.

Received rows stand by bin, source rank, token (see `route.py`). What follows the last
of a bin is unspecified, NaN included: mask by `route.counts_L`. `route.overflow` must be
looked at: what exceeded a bound was not sent.

Implementations (`impl`; None takes the platform's own, and `reference` where the rows
or the processes do not suit it):

| name | runs on | what |
|---|---|---|
| reference | everywhere | `lax.all_to_all` of equal shares |
| gpu | NVIDIA Hopper, GPUs of one process | Mosaic GPU kernel: rows through shared memory into the peer's buffer, over NVLink |
| tpu | TPU | remote DMA from row to row |

A named implementation works or raises; it never falls back to another.

Shape suffixes: M tokens, A copies of a token at most, D model, C rows of a receive
buffer, L bins of one rank.
"""  # noqa: E501

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.all_to_all import reference
from kernels_pallas.all_to_all.route import Axis, Route, plan_experts, plan_ranks
from kernels_pallas.choose import choose

__all__ = [
  "Route",
  "bring_home",
  "combine",
  "dispatch",
  "plan_experts",
  "plan_ranks",
  "send_rows",
  "sum_copies",
]

_BY_PLATFORM = {"cpu": "reference", "gpu": "gpu", "tpu": "tpu"}
_PORTABLE = ("reference",)


def send_rows(
  values: Sequence[jax.Array],
  address_MA: jax.Array,
  count: jax.Array | int,
  received: jax.Array,
  *,
  rows: int,
  axis: Axis,
  source_M: jax.Array | None = None,
  num_sms: int | None = None,
  impl: str | None = None,
) -> list[jax.Array]:
  """Writes rows into other ranks' buffers. Not differentiable: see `dispatch`.

  Row `source_M[m]` of each of `values` goes to each rank and row that `address_MA[m]`
  names. All ranks of the axis call it together, with the same shapes, none inside a
  branch that another does not take.

  Args:
    values: arrays [rows here, ...] of any dtype, sent together.
    address_MA: int32 rank * rows + row, negative for nothing; no two alike over ranks.
    count: int32, entries from this one on are not looked at.
    received: int32, how many rows the others, and this rank, send here.
    rows: rows of a receive buffer, the same on every rank.
    axis: mesh axis, or several as one, inside `jax.shard_map`.
    source_M: int32 rows of `values`; None for row m itself.
    num_sms: multiprocessors that the GPU's kernel uses, None for 16; fewer are slower
      and leave more to a computation beside it.
    impl: a name from the module's table, or None.

  Returns:
    An array [rows, ...] for each of `values`; rows that nobody wrote are unspecified.

  Raises:
    ValueError: shapes that do not fit together, or an implementation that does not run
      on this platform or with these shapes.
  """
  values = list(values)
  _check(values, address_MA, source_M)
  name = _choose(impl, values)
  count, received = (jnp.asarray(n, jnp.int32) for n in (count, received))
  options: dict[str, Any] = {"num_sms": num_sms} if name == "gpu" else {}
  return _implementation(name).send_rows(
    values, address_MA, count, received, rows, axis, source_M=source_M, **options
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dispatch(values: Any, route: Route, impl: str | None = None) -> Any:
  """Sends each token to its ranks or experts, the transpose of `combine`.

  Args:
    values: an array [M, ...] or a tree of them, sent together: tokens, and beside them
      what travels with them, such as gates and experts. Integers have no gradient.
    route: as `plan_ranks` or `plan_experts` made it.
    impl: as for `send_rows`.

  Returns:
    `values` with C rows for M; those that `route.is_filled()` denies are unspecified.
  """
  leaves, tree = jax.tree.flatten(values)
  received = send_rows(
    leaves,
    route.address_MA,
    route.address_MA.shape[0],
    route.counts_L.sum(),
    rows=route.rows,
    axis=route.axis,
    impl=impl,
  )
  return jax.tree.unflatten(tree, received)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def combine(values: Any, route: Route, impl: str | None = None) -> Any:
  """Brings rows home and sums each token's, the transpose of `dispatch`.

  Args:
    values: an array [C, ...] of floats or a tree of them; rows that nobody sent here
      reach nothing.
    route, impl: as for `dispatch`.

  Returns:
    `values` with M rows for C, summed in FP32, in the dtypes of `values`.
  """
  return sum_copies(bring_home(values, route, impl), route)


def bring_home(
  values: Any, route: Route, impl: str | None = None, num_sms: int | None = None
) -> Any:
  """`combine` before its sum: row `route.home_MA[m, a]` is copy a of token m."""
  leaves, tree = jax.tree.flatten(values)
  home = send_rows(
    leaves,
    route.return_R[:, None],
    route.counts_L.sum(),
    (route.home_MA >= 0).sum(),
    rows=route.home_rows,
    axis=route.axis,
    source_M=route.source_R,
    num_sms=num_sms,
    impl=impl,
  )
  return jax.tree.unflatten(tree, home)


def sum_copies(values: Any, route: Route) -> Any:
  """What `combine` does with rows that are home: arrays of M rows."""
  return jax.tree.map(functools.partial(_sum_copies, route=route), values)


def _sum_copies(home: jax.Array, *, route: Route) -> jax.Array:
  wide = jnp.promote_types(home.dtype, jnp.float32)
  # Negative rows would count from the end; the row past the end is a zero.
  home_MA = jnp.where(route.home_MA < 0, route.home_rows, route.home_MA)
  out = jnp.zeros((home_MA.shape[0], *home.shape[1:]), wide)
  for a in range(home_MA.shape[1]):
    out += home.at[home_MA[:, a]].get(mode="fill", fill_value=0).astype(wide)
  return out.astype(home.dtype)


def _dispatch_forward(values, route, impl):
  return dispatch(values, route, impl), (route, values)


def _dispatch_backward(impl, residuals, gradients):
  route, values = residuals
  leaves, tree = jax.tree.flatten(gradients)
  real = [g for g in leaves if g.dtype != jax.dtypes.float0]
  summed = iter(combine(real, route, impl) if real else [])
  inputs = jax.tree.leaves(values)
  back = [
    np.zeros(x.shape, g.dtype) if g.dtype == jax.dtypes.float0 else next(summed)
    for x, g in zip(inputs, leaves)
  ]
  return jax.tree.unflatten(tree, back), _no_gradient(route)


def _combine_forward(values, route, impl):
  return combine(values, route, impl), route


def _combine_backward(impl, route, gradients):
  # Rows that nobody sent had no part in the sum: their gradient is 0, not unspecified.
  def zero_elsewhere(g):
    filled = route.is_filled().reshape(-1, *[1] * (g.ndim - 1))
    return jnp.where(filled, g, 0)

  sent = dispatch(gradients, route, impl)
  return jax.tree.map(zero_elsewhere, sent), _no_gradient(route)


dispatch.defvjp(_dispatch_forward, _dispatch_backward)
combine.defvjp(_combine_forward, _combine_backward)


def _no_gradient(route: Route) -> Route:
  return jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), route)


def _implementation(name: str) -> ModuleType:
  """The module behind a name; kernels are imported when first asked for."""
  if name == "gpu":
    from kernels_pallas.all_to_all import gpu

    return gpu
  if name == "tpu":
    from kernels_pallas.all_to_all import tpu

    return tpu
  return reference


def _choose(impl: str | None, values: list[jax.Array]) -> str:
  """Settles the name, and whether its kernel takes these rows."""
  name = choose("all_to_all", impl, _BY_PLATFORM, _PORTABLE)
  if name in _PORTABLE:
    return name
  reason = _implementation(name).unsupported(values)
  if reason is None:
    return name
  if impl is None:
    return "reference"
  raise ValueError(f"all_to_all: impl={impl!r} {reason}, or pass impl='reference'")


def _check(
  values: list[jax.Array], address_MA: jax.Array, source_M: jax.Array | None
) -> None:
  tokens = {value.shape[0] for value in values}
  entries = len(address_MA) if source_M is None else len(source_M)
  if (
    address_MA.ndim != 2
    or len(tokens) != 1
    or entries != len(address_MA)
    or (source_M is None and tokens != {entries})
  ):
    sources = "none" if source_M is None else source_M.shape
    raise ValueError(
      "all_to_all needs values [M, ...] and addresses [M, A] of one M, or sources [M] "
      f"as many as addresses, got {[value.shape for value in values]}, "
      f"{address_MA.shape}, sources {sources}"
    )
  for name, array in (("addresses", address_MA), ("sources", source_M)):
    if array is not None and array.dtype != jnp.int32:
      raise ValueError(f"all_to_all needs int32 {name}, got {array.dtype}: cast them")
