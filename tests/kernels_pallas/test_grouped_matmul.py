"""One suite over every implementation that runs here, against a NumPy float64 loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import grouped_matmul as gm
from kernels_pallas.choose import target_platform
from kernels_pallas.grouped_matmul import gpu, schedule, tpu
from tests import tpu_topology


def on(platform):
  return pytest.mark.skipif(target_platform() != platform, reason=f"not on {platform}")


IMPLS = [
  "reference",
  "blocks",
  pytest.param("gpu", marks=[pytest.mark.gpu, on("gpu")]),
  pytest.param("tpu", marks=on("tpu")),
]
# Groups in units of the row multiple, and the rows of padding after them; all have one
# shape, so a compiled function serves them all.
LAYOUTS = {
  "ragged": ([3, 1, 2, 1, 1, 2], 0),
  "empty groups": ([0, 3, 0, 0, 5, 0], 2),
  "one group": ([0, 0, 9, 0, 0, 0], 1),
  "one group fills all": ([0, 10, 0, 0, 0, 0], 0),
  "only padding": ([0, 0, 0, 0, 0, 0], 10),
}
DTYPES = [jnp.float32, jnp.bfloat16]


def exact(x, w, sizes, dy):
  """y, dx, dw in float64, and the sums of magnitudes that bound their rounding."""
  y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros(x.shape), np.zeros(w.shape)
  start = 0
  for e, size in enumerate(sizes):
    rows = slice(start, start + size)
    y[rows], dx[rows], dw[e] = x[rows] @ w[e], dy[rows] @ w[e].T, x[rows].T @ dy[rows]
    start += size
  return y, dx, dw


def assert_close(got, want, magnitude, terms, dtype):
  """Per element: FP32 accumulation of `terms` products, then one rounding to dtype.

  Summing n products in FP32 in any order errs by less than n * 2^-24 of the sum of
  their magnitudes (inputs are exact, BF16 products are exact in FP32); rounding to
  dtype adds half a unit in the last place, eps/2 of the value.
  """
  bound = terms * 2.0**-24 * magnitude + float(jnp.finfo(dtype).eps) / 2 * abs(want)
  error = abs(np.asarray(got, np.float64) - want)
  assert np.isfinite(error).all()
  assert (error <= bound * 1.01).all(), (error / np.maximum(bound, 1e-300)).max()


def inputs(units, padding, multiple, d, f, dtype, seed=0):
  rng = np.random.default_rng(seed)
  sizes = np.array(units, np.int32) * multiple
  rows, experts = int(sizes.sum()) + padding * multiple, len(units)
  x = jnp.asarray(rng.normal(size=(rows, d)), dtype)
  w = jnp.asarray(rng.normal(size=(experts, d, f)), dtype)
  dy = jnp.asarray(rng.normal(size=(rows, f)), dtype)
  return x, w, jnp.asarray(sizes), dy


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(impl, x, w, sizes, dy):
  y, vjp = jax.vjp(lambda x, w: gm.grouped_matmul(x, w, sizes, impl=impl), x, w)
  return (y, *vjp(dy))


def dims(impl):
  return (128, 256) if impl in ("gpu", "tpu") else (24, 40)


def assert_products(got, x, w, sizes, dy, dtypes):
  """y, dx, dw against float64; exact zeros for padding and for empty groups."""
  x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
  used = int(sizes.sum())
  x[used:] = dy[used:] = 0
  want = exact(x, w, sizes, dy)
  magnitudes = exact(abs(x), abs(w), sizes, abs(dy))
  terms = (w.shape[1], w.shape[2], len(x))
  for g, value, magnitude, n, dtype in zip(got, want, magnitudes, terms, dtypes):
    assert g.dtype == dtype
    assert_close(g, value, magnitude, n, dtype)
  y, dx, dw = (np.asarray(g, np.float64) for g in got)
  assert (y[used:] == 0).all()
  assert (dx[used:] == 0).all()
  assert (dw[np.asarray(sizes) == 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_values_and_gradients(impl, layout, dtype):
  if impl in ("gpu", "tpu") and dtype == jnp.float32:
    pytest.skip("gpu refuses FP32; the TPU's matrix unit rounds FP32 operands")
  d, f = dims(impl)
  args = inputs(*LAYOUTS[layout], gm.row_multiple(impl), d, f, dtype)
  assert_products(value_and_gradients(impl, *args), *args, [dtype] * 3)


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_is_never_read(impl):
  d, f = dims(impl)
  x, w, sizes, dy = inputs(
    [2, 0, 1, 0, 1, 1], 5, gm.row_multiple(impl), d, f, jnp.bfloat16
  )
  used = int(sizes.sum())
  clean = value_and_gradients(impl, x, w, sizes, dy)
  poisoned = value_and_gradients(
    impl, x.at[used:].set(jnp.nan), w, sizes, dy.at[used:].set(jnp.inf)
  )
  for a, b in zip(clean, poisoned):
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("impl", IMPLS[2:3])
def test_64_columns(impl):
  """As few as one store of the kernel has."""
  args = inputs([2, 0, 1], 1, gm.row_multiple(impl), 64, 64, jnp.bfloat16)
  assert_products(value_and_gradients(impl, *args), *args, [jnp.bfloat16] * 3)


# Blocks of a group: odd and even numbers, and more than a band holds.
@pytest.mark.parametrize("units", [[3, 0, 2, 1, 5], [0, 37, 1, 0, 16]], ids=str)
@pytest.mark.parametrize("columns", [1024, 768, 384])
@pytest.mark.gpu
@on("gpu")
def test_pairs_of_thread_blocks(units, columns):
  """Tiles across, an even number or not; of dw the last of a pair lies outside."""
  x, w, sizes, dy = inputs(units, 3, 128, 384, columns, jnp.bfloat16)
  used = int(sizes.sum())
  x, dy = x.at[used:].set(jnp.nan), dy.at[used:].set(jnp.nan)

  def products(**options):
    return (
      gpu.multiply(x, w, sizes, **options),
      gpu.multiply(dy, w, sizes, transpose_w=True, **options),
      gpu.multiply_rows(x, dy, sizes, jnp.bfloat16, **options),
    )

  got = products()
  assert_products(got, x, w, sizes, dy, [jnp.bfloat16] * 3)
  others = products(tiling=gpu.Tiling()), products(num_sms=8)
  jax.tree.map(np.testing.assert_array_equal, (got, got), others)


@pytest.mark.parametrize("units", [[3, 0, 2, 1, 5], [0, 37, 1, 0, 16], [0, 0]], ids=str)
@pytest.mark.parametrize("most", [4, 16])
def test_bands(units, most):
  """Every tile once, alone and in pairs, which share a matrix's columns or a row."""
  rest, across = 3, 6
  blocks = sum(units) + rest
  group = np.repeat(range(len(units) + 1), [*units, rest])
  table = schedule.bands(jnp.asarray(units) * 128, 128 * blocks, most)
  np.testing.assert_array_equal(table[0], group)
  count_m = np.asarray(table[2])
  assert (count_m <= most).all()
  last = np.append(np.cumsum(units), blocks)[group] == np.asarray(table[1]) + count_m
  assert ((count_m % 2 == 0) | last).all()

  def places(cluster):
    i = jnp.arange(blocks * across // cluster)
    _, first, count = table[:, i * cluster // across]
    i = i - first * across // cluster
    if cluster == 1:
      return [(first + i % count, i // count)], None
    pairs = [schedule.pair_in_band(i, count, across, second) for second in (0, 1)]
    return [(first + row, column) for row, column, _ in pairs], pairs[0][2]

  def times_seen(tiles):
    seen = np.zeros((blocks, across), int)
    for row, column in tiles:
      np.add.at(seen, (np.asarray(row), np.asarray(column)), 1)
    return seen

  assert (times_seen(places(1)[0]) == 1).all()
  pair, is_column = places(2)
  assert (times_seen(pair) == 1).all()
  (row, column), (other_row, other_column) = pair
  np.testing.assert_array_equal(group[row], group[other_row])
  np.testing.assert_array_equal(column == other_column, is_column)
  np.testing.assert_array_equal(row == other_row, ~is_column)


@pytest.mark.parametrize("impl", IMPLS)
def test_dw_in_fp32_keeps_what_bf16_rounds_away(impl):
  d, f = dims(impl)
  x, _, sizes, dy = inputs(
    [4, 0, 2, 0, 1, 1], 2, gm.row_multiple(impl), d, f, jnp.bfloat16
  )
  dw = gm.grouped_matmul_dw(x, dy, sizes, impl=impl)
  assert dw.dtype == jnp.float32
  x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
  w = np.zeros((6, d, f))
  want, magnitude = exact(x, w, sizes, dy)[2], exact(abs(x), w, sizes, abs(dy))[2]
  assert_close(dw, want, magnitude, len(x), jnp.float32)


def test_blocks_that_straddle_groups_and_the_end():
  # More rows than one block, sizes that are no multiple of a block.
  x, w, sizes, dy = inputs([1, 40, 17, 0, 5], 1, 8, 16, 8, jnp.float32)
  got = value_and_gradients("blocks", x, w, sizes, dy)
  assert_products(got, x, w, sizes, dy, [jnp.float32] * 3)


def test_group_sizes_are_run_time_values():
  traces = []

  @jax.jit
  def f(x, w, sizes):
    traces.append(1)
    return gm.grouped_matmul(x, w, sizes, impl="blocks")

  x, w, _, _ = inputs([2, 2], 0, 8, 8, 8, jnp.float32)
  for sizes in ([16, 16], [32, 0], [0, 8]):
    y = f(x, w, jnp.array(sizes, jnp.int32))
    want, *_ = exact(np.asarray(x), np.asarray(w), sizes, np.zeros((32, 8)))
    np.testing.assert_allclose(y, want, atol=1e-5)  # 8 products of about 1, FP32
  assert len(traces) == 1


@on("cpu")
@pytest.mark.parametrize("module", [gpu, tpu], ids=["gpu", "tpu"])
def test_kernels_interpreted(module):
  """The kernels' own logic on any machine: empty groups, NaN padding, column tiles
  that reach past the edge of the GPU's 256, a group of two bands."""
  interpret = plgpu.InterpretGPUParams() if module is gpu else True
  d, f = (128, 320) if module is gpu else (128, 384)
  options = {"tiling": gpu.Tiling(snake=2)} if module is gpu else {}
  x, w, sizes, dy = inputs([0, 1, 0, 3, 0], 1, 128, d, f, jnp.bfloat16)
  used = int(sizes.sum())
  x, dy = x.at[used:].set(jnp.nan), dy.at[used:].set(jnp.nan)
  got = (
    module.multiply(x, w, sizes, interpret=interpret, **options),
    module.multiply(dy, w, sizes, transpose_w=True, interpret=interpret),
    module.multiply_rows(x, dy, sizes, jnp.float32, interpret=interpret),
  )
  dtypes = jnp.bfloat16, jnp.bfloat16, jnp.float32
  assert_products(got, x, w, sizes, dy, dtypes)


@pytest.mark.parametrize(
  "shape", [(8, 4096, 4096, 7168), (64, 1536, 1408, 2048)], ids=["8", "64"]
)
def test_gpu_kernels_lower_for_cuda(shape):
  experts, rows, d, f = shape
  x = jax.ShapeDtypeStruct((experts * rows, d), jnp.bfloat16)
  w = jax.ShapeDtypeStruct((experts, d, f), jnp.bfloat16)
  dy = jax.ShapeDtypeStruct((experts * rows, f), jnp.bfloat16)
  sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)

  def products(x, w, sizes, dy):
    return (
      gpu.multiply(x, w, sizes),
      gpu.multiply(dy, w, sizes, transpose_w=True),
      gpu.multiply_rows(x, dy, sizes, jnp.bfloat16),
      gpu.multiply_rows(x, dy, sizes, jnp.float32),
    )

  lowered = jax.jit(products).trace(x, w, sizes, dy).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("mosaic_gpu") >= 4


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "tpu7x:2x2x1"])
def test_compiles_for_tpu_topologies(topology):
  """Through the public function: a mesh of TPUs picks the TPU's kernels by itself."""
  devices = tpu_topology.devices(topology)
  mesh = Mesh(np.array(devices[:1]), ("one",))
  spec = NamedSharding(mesh, P())

  def step(x, w, sizes, dy):
    y, vjp = jax.vjp(lambda x, w: gm.grouped_matmul(x, w, sizes), x, w)
    return y, *vjp(dy)

  args = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=spec)
    for shape, dtype in [
      ((4096, 1408), jnp.bfloat16),
      ((8, 1408, 2048), jnp.bfloat16),
      ((8,), jnp.int32),
      ((4096, 2048), jnp.bfloat16),
    ]
  ]
  local = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
  compiled = jax.jit(local).lower(*args).compile()
  assert compiled.as_text().count("tpu_custom_call") >= 3


def test_refusals():
  x, w, sizes, _ = inputs([1, 1], 0, 128, 128, 128, jnp.float32)
  with pytest.raises(ValueError, match="impl='nosuch' is unknown"):
    gm.grouped_matmul(x, w, sizes, impl="nosuch")
  for name in {"gpu", "tpu"} - {target_platform()}:
    with pytest.raises(ValueError, match=f"impl='{name}' does not run on platform"):
      gm.grouped_matmul(x, w, sizes, impl=name)
    with pytest.raises(ValueError, match=f"impl='{name}' does not run on platform"):
      gm.row_multiple(name)
  with pytest.raises(ValueError, match="bfloat16 and float32"):
    gm.grouped_matmul(x.astype(jnp.bfloat16), w, sizes)
  with pytest.raises(ValueError, match="2 integer group sizes"):
    gm.grouped_matmul(x, w, sizes[:1])
  with pytest.raises(ValueError, match=r"x \[Z, D\] and w \[E, D, F\]"):
    gm.grouped_matmul(x[:, :5], w, sizes)


def test_default_runs_on_this_platform():
  x, w, sizes, _ = inputs([1, 2], 0, gm.row_multiple(), 128, 128, jnp.float32)
  assert target_platform() in ("cpu", "gpu", "tpu")
  y = gm.grouped_matmul(x, w, sizes)
  want = gm.grouped_matmul(x, w, sizes, impl="reference")
  # 128 products in FP32: 128 * 2^-24 of a sum of magnitudes of about 100.
  np.testing.assert_allclose(y, want, atol=1e-3)


def test_shapes_that_kernels_refuse():
  assert "bfloat16 only" in gpu.unsupported(jnp.float32, 128, 128)
  assert "multiples of 64, got D=96" in gpu.unsupported(jnp.bfloat16, 96, 128)
  assert gpu.unsupported(jnp.bfloat16, 1408, 64) is None
  assert "multiples of 128, got D=128, F=64" in tpu.unsupported(jnp.float32, 128, 64)
  assert tpu.unsupported(jnp.bfloat16, 1408, 7168) is None
