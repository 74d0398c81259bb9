"""Decoding's slots against a literal NumPy reading of DeepEP's low-latency contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.mesh import BATCH_AXES, make_mesh, split_axes
from deepseek_jax.parallel import decode_dispatch as d
from tests.parallel.test_dispatch import A, E, choices

M, D = 5, 6  # tokens of a rank: their slots are no multiple of 8
MESHES = {
  "1": {},
  "4": {"expert": 4},
  "2x4": {"node": 2, "expert": 4},
  "2 of 2x2": {"data": 2, "node": 2, "expert": 2},
}


@functools.cache
def there_and_back(name: str, dtype):
  """x -> what arrives, counts, and sums of expert e's (e + 1) x, on each rank."""
  sizes = MESHES[name]
  n = int(np.prod(list(sizes.values()), dtype=int))
  mesh = make_mesh(**sizes, devices=jax.devices()[:n])
  axes = split_axes(mesh)

  def body(x, experts, gates):
    slots = d.make_slots(experts, n_experts=E, axes=axes)
    rows, codes = d.dispatch([x, x.astype(jnp.float8_e4m3fn)], slots)
    local = len(slots.counts_L)
    first = jax.lax.axis_index(axes) * local if axes else 0
    taken = jnp.arange(slots.capacity) < slots.counts_L[:, None]
    factor = 1 + first + jnp.arange(local)
    y = rows * factor.astype(dtype)[:, None, None]
    y = jnp.where(taken[:, :, None], y, jnp.nan)
    out = d.combine(y, gates, slots)
    return rows, codes, slots.counts_L, out, slots.overflow[None], slots.copies_S[None]

  spec = P(BATCH_AXES)
  run = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  return jax.jit(run), n, sizes.get("data", 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["uniform", "skewed", "same"])
@pytest.mark.parametrize("name", MESHES)
def test_each_expert_has_its_tokens_in_order_and_gates_weigh_at_home(name, kind, dtype):
  if len(jax.devices()) < np.prod(list(MESHES[name].values()), dtype=int):
    pytest.skip("needs as many devices")
  run, ranks, replicas = there_and_back(name, dtype)
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(ranks * M, D)), dtype)
  experts = choices(kind, ranks * M)
  gates = rng.uniform(0.1, 1, size=experts.shape).astype(np.float32)
  rows, codes, counts, out, overflow, copies = run(x, experts, gates)
  assert not np.any(overflow)
  np.testing.assert_array_equal(copies, M * A)
  shape = (replicas, E, -1, D)
  rows, wide = np.asarray(rows, np.float64).reshape(shape), np.asarray(x, np.float64)
  narrow = np.asarray(x.astype(jnp.float8_e4m3fn), np.float64)
  codes = np.asarray(codes, np.float64).reshape(shape)
  counts = np.asarray(counts).reshape(replicas, E)
  assert rows.shape[2] == d.slots_of_expert(ranks // replicas * M) >= counts.max()
  for replica in range(replicas):  # each among its own tokens
    mine = np.split(np.arange(ranks * M), replicas)[replica]
    for e in range(E):
      tokens = mine[(experts[mine] == e).any(1)]
      assert counts[replica, e] == len(tokens)
      np.testing.assert_array_equal(rows[replica, e, : len(tokens)], wide[tokens])
      np.testing.assert_array_equal(codes[replica, e, : len(tokens)], narrow[tokens])

  products = np.asarray(x)[:, None] * (1 + experts).astype(dtype)[:, :, None]
  terms = gates[:, :, None].astype(np.float64) * products.astype(np.float64)
  want, magnitude = terms.sum(1), abs(terms).sum(1)
  # A products and sums in FP32, then one rounding to dtype.
  bound = 2 * A * 2.0**-24 * magnitude + float(jnp.finfo(dtype).eps) / 2 * abs(want)
  assert (abs(np.asarray(out, np.float64) - want) <= bound * 1.01).all()


def test_slots_of_an_expert_are_whole_eights():
  assert [d.slots_of_expert(n) for n in (1, 8, 9, 1024)] == [8, 8, 16, 1024]
