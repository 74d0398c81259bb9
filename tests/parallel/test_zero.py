"""ZeRO-1: shards put together are the whole, gradients sum once, the norm is global."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.mesh import make_mesh
from deepseek_jax.parallel import zero

SHAPES = {  # shape, PartitionSpec of compute
  "matrix": ((16, 24), P()),
  "experts": ((2, 8, 16, 6), P("pipeline", "expert")),
  "stacked": ((2, 5, 32), P("pipeline")),
  "odd": ((3, 5), P()),
}


@pytest.mark.parametrize("sizes", [(1, 2, 4), (1, 8, 1), (1, 1, 8), (1, 1, 1)])
def test_gather_scatter_and_norm(sizes):
  mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
  layouts = {
    n: zero.plan_layout(shape, spec, mesh, split=True)
    for n, (shape, spec) in SHAPES.items()
  }
  rng = np.random.default_rng(0)
  whole = {n: rng.normal(size=s).astype(np.float32) for n, (s, _) in SHAPES.items()}
  stored = {n: layout.stored for n, layout in layouts.items()}
  compute = {n: layout.compute for n, layout in layouts.items()}

  def body(shards):
    gathered = {
      n: zero.gather_weight(x, layouts[n], x.dtype) for n, x in shards.items()
    }
    gradients = {n: zero.scatter_gradient(x, layouts[n]) for n, x in gathered.items()}
    return gathered, gradients, zero.global_norm(shards, layouts)

  gathered, gradients, norm = jax.jit(
    jax.shard_map(
      body,
      mesh=mesh,
      in_specs=(stored,),
      out_specs=(compute, stored, P()),
      check_vma=False,
    )
  )(whole)
  for name, value in whole.items():
    np.testing.assert_array_equal(gathered[name], value)
    ranks = np.prod([mesh.shape[a] for a in layouts[name].axes])
    np.testing.assert_allclose(gradients[name], ranks * value, rtol=1e-6)
  expected = np.sqrt(sum((v.astype(np.float64) ** 2).sum() for v in whole.values()))
  np.testing.assert_allclose(norm, expected, rtol=1e-6)


def test_the_longest_free_dimension_is_split():
  mesh = make_mesh(1, 2, 4)
  layout = zero.plan_layout((16, 24), P(), mesh, split=True)
  assert layout.stored == P(None, ("data", "expert"))
  assert layout.copies == 1
  layout = zero.plan_layout((8, 16, 6), P("expert"), mesh, split=True)
  assert layout.stored == P("expert", "data")
  layout = zero.plan_layout((3, 5), P(), mesh, split=True)
  assert (layout.dim, layout.copies) == (None, 8)
  layout = zero.plan_layout((16,), P(), mesh, split=False)
  assert (layout.stored, layout.copies) == (P(), 8)


def test_weights_are_cast_before_they_travel():
  mesh = make_mesh(1, 8, 1)
  layout = zero.plan_layout((16, 8), P(), mesh, split=True)
  gather = jax.shard_map(
    lambda x: zero.gather_weight(x, layout, jnp.bfloat16),
    mesh=mesh,
    in_specs=layout.stored,
    out_specs=P(),
    check_vma=False,
  )
  text = str(jax.make_jaxpr(gather)(jnp.ones((16, 8))))
  line = next(line for line in text.splitlines() if "all_gather" in line)
  assert "bf16" in line.split("=")[0]
