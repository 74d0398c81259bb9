"""Dispatch and combine against a literal NumPy reading of DeepEP's contract."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.mesh import EXPERT_AXES, make_mesh, split_axes
from deepseek_jax.parallel import dispatch as d

M, D, E, A, MULTIPLE = 12, 5, 8, 3, 4


def choices(kind: str, tokens: int, seed: int = 0) -> np.ndarray:
  """Distinct experts of each token: uniform, skewed to one rank, or all the same."""
  rng = np.random.default_rng(seed)
  if kind == "same":
    return np.tile(np.arange(A), (tokens, 1)).astype(np.int32)
  weights = np.ones(E)
  if kind == "skewed":
    weights[: E // 4] = 50
  weights /= weights.sum()
  picks = [rng.choice(E, A, replace=False, p=weights) for _ in range(tokens)]
  return np.stack(picks).astype(np.int32)


def on_ranks(ranks: int, capacity: float, fn, nodes: int = 1):
  """fn(make_plan, x, experts, gates) -> arrays, on every rank of the expert axes."""
  mesh = make_mesh(expert=ranks // nodes, node=nodes, devices=jax.devices()[:ranks])
  run = functools.partial(
    d.make_plan,
    n_experts=E,
    row_multiple=MULTIPLE,
    capacity=capacity,
    axes=split_axes(mesh),
  )
  body = lambda *args: fn(run, *args)  # noqa: E731
  spec = P(EXPERT_AXES)
  return jax.jit(
    jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  )


def inputs(ranks: int, kind: str):
  rng = np.random.default_rng(1)
  x = rng.normal(size=(ranks * M, D)).astype(np.float32)
  experts = choices(kind, ranks * M)
  gates = rng.uniform(0.1, 1, size=experts.shape).astype(np.float32)
  return x, experts, gates


def arranged(make_plan, x, experts, gates):
  plan = make_plan(experts)
  rows, row_gates = d.dispatch(x, gates, plan)
  return rows, row_gates, plan.group_sizes_E, plan.overflow[None]


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("kind", ["uniform", "skewed", "same"])
def test_rows_stand_by_expert_then_source_rank_then_token(ranks, kind):
  x, experts, gates = inputs(ranks, kind)
  rows, row_gates, sizes, overflow = on_ranks(ranks, math.inf, arranged)(
    x, experts, gates
  )
  assert not np.any(overflow)
  local = E // ranks
  rows = np.asarray(rows).reshape(ranks, -1, D)
  row_gates = np.asarray(row_gates).reshape(ranks, -1)
  sizes = np.asarray(sizes).reshape(ranks, local)
  for rank in range(ranks):
    start = 0
    for e in range(local):
      tokens, slots = np.nonzero(experts == rank * local + e)
      n = len(tokens)
      assert sizes[rank, e] == -(-n // MULTIPLE) * MULTIPLE
      np.testing.assert_array_equal(rows[rank, start : start + n], x[tokens])
      np.testing.assert_array_equal(
        row_gates[rank, start : start + n], gates[tokens, slots]
      )
      assert not rows[rank, start + n : start + sizes[rank, e]].any()
      start += sizes[rank, e]
    assert not rows[rank, start:].any()
    assert not row_gates[rank, start:].any()


@pytest.mark.parametrize(("ranks", "nodes"), [(1, 1), (2, 1), (8, 1), (8, 2), (8, 4)])
@pytest.mark.parametrize("kind", ["uniform", "skewed", "same"])
def test_combine_of_dispatch_counts_every_choice_once(ranks, nodes, kind):
  x, experts, gates = inputs(ranks, kind)

  def both(make_plan, x, experts, gates):
    plan = make_plan(experts)
    return d.combine(d.dispatch(x, gates, plan)[0], plan)

  out = on_ranks(ranks, math.inf, both, nodes)(x, experts, gates)
  # Sums of A equal terms in FP32: exact for A = 3 up to one rounding of 3x.
  np.testing.assert_allclose(out, A * x, rtol=2e-7)


@pytest.mark.parametrize(("ranks", "nodes"), [(1, 1), (4, 1), (8, 2)])
def test_gradients_are_transposes_and_padding_reaches_nothing(ranks, nodes):
  x, experts, gates = inputs(ranks, "skewed")

  def check(make_plan, x, experts, gates):
    plan = make_plan(experts)

    def forward(x, gates):
      return d.dispatch(x, gates, plan)

    (rows, row_gates), pull = jax.vjp(forward, x, gates)
    key = jax.random.key(3)
    filled = (rows != 0).any(-1)
    r = jax.random.normal(key, rows.shape)
    g = jax.random.normal(key, row_gates.shape)
    # What stands in padding rows must not matter.
    d_x, d_gates = pull(
      (jnp.where(filled[:, None], r, jnp.nan), jnp.where(filled, g, jnp.nan))
    )
    combined, push = jax.vjp(lambda rows: d.combine(rows, plan), rows)
    back = push(d_x)[0]
    left = jnp.sum(jnp.where(filled[:, None], r * rows, 0))
    sums = [left, jnp.sum(d_x * x), jnp.sum(jnp.where(filled, g * row_gates, 0))]
    sums += [jnp.sum(d_gates * gates), jnp.sum(combined * d_x), jnp.sum(rows * back)]
    return jnp.stack([jax.lax.psum(s, EXPERT_AXES) for s in sums])[None]

  sums = np.asarray(on_ranks(ranks, math.inf, check, nodes)(x, experts, gates))[0]
  np.testing.assert_allclose(sums[0::2], sums[1::2], rtol=2e-5)


@pytest.mark.parametrize("nodes", [1, 2])
def test_bounds_that_are_exceeded_are_reported_and_ample_ones_are_not(nodes):
  ranks = 4
  for kind, capacity, expected in (
    ("uniform", 3.0, False),
    ("uniform", 0.3, True),
    ("same", 1.2, True),
    ("same", math.inf, False),
  ):
    *_, sizes, overflow = on_ranks(ranks, capacity, arranged, nodes)(
      *inputs(ranks, kind)
    )
    assert bool(np.any(overflow)) == expected, (kind, capacity)
    rows = d.row_bound(M, A, ranks, E // ranks, capacity) + E // ranks * MULTIPLE
    assert np.asarray(sizes).reshape(ranks, -1).sum(-1).max() <= rows + MULTIPLE


def test_a_token_travels_once_to_each_rank():
  ranks, local = 4, E // 4
  x, experts, gates = inputs(ranks, "uniform")

  def copies(make_plan, x, experts, gates):
    return make_plan(experts).copies_S

  out = on_ranks(ranks, math.inf, copies)(x, experts, gates)
  expected = [len(set(row // local)) for row in experts]
  np.testing.assert_array_equal(out, np.sum(np.reshape(expected, (ranks, M)), axis=1))


@pytest.mark.parametrize("nodes", [2, 4])
@pytest.mark.parametrize("kind", ["uniform", "skewed", "same"])
def test_across_nodes_the_same_rows_arrive(nodes, kind):
  """Those of the flat form; by place within the node, then node, then token."""
  ranks, local = 8, E // 8
  x, experts, gates = inputs(ranks, kind)
  rows, row_gates, sizes, overflow = on_ranks(ranks, math.inf, arranged, nodes)(
    x, experts, gates
  )
  assert not np.any(overflow)
  rows, row_gates = (
    np.asarray(r).reshape(ranks, -1, *r.shape[1:]) for r in (rows, row_gates)
  )
  sizes = np.asarray(sizes).reshape(ranks, local)
  for rank in range(ranks):
    tokens, slots = np.nonzero(experts == rank)
    source = tokens // M
    order = np.lexsort((tokens, source // (8 // nodes), source % (8 // nodes)))
    tokens, slots = tokens[order], slots[order]
    n = len(tokens)
    assert sizes[rank] == -(-n // MULTIPLE) * MULTIPLE
    np.testing.assert_array_equal(rows[rank, :n], x[tokens])
    np.testing.assert_array_equal(row_gates[rank, :n], gates[tokens, slots])
    assert not rows[rank, n:].any()
    assert not row_gates[rank, n:].any()


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("kind", ["uniform", "skewed", "same"])
def test_a_token_crosses_once_to_each_node(nodes, kind):
  """The traffic of every link, counted token by token."""
  ranks, inside = 8, 8 // nodes
  x, experts, gates = inputs(ranks, kind)

  def sent(make_plan, x, experts, gates):
    plan = make_plan(experts)
    return plan.copies_S[None], *(line[None] for line in plan.traffic)

  copies, *traffic = on_ranks(ranks, math.inf, sent, nodes)(x, experts, gates)
  lines = {}
  for token, chosen in enumerate(experts):
    rank = token // M
    node, place = divmod(rank, inside)
    reached = {divmod(int(e) * ranks // E, inside) for e in chosen}
    across = {(node, n, place) for n, _ in reached} if nodes > 1 else set()
    within = {(place, p, n) for n, p in reached}  # from its own place, on every node
    for key in [("node", *hop) for hop in across] + [
      ("expert", *hop) for hop in within
    ]:
      lines[key] = lines.get(key, 0) + 1
  axes = ["node", "expert"] if nodes > 1 else ["expert"]
  for axis, found in zip(axes, traffic):
    for rank, line in enumerate(np.asarray(found)):
      along, across = divmod(rank, inside)[:: 1 if axis == "expert" else -1]
      n = len(line)
      expected = [
        [lines.get((axis, a, b, along), 0) for b in range(n)] for a in range(n)
      ]
      np.testing.assert_array_equal(line, expected)
      assert copies[rank, axes.index(axis)] == np.sum(expected[across])
  if nodes > 1:
    flat = sum(
      len({int(e) for e in chosen if e // inside != token // M // inside})
      for token, chosen in enumerate(experts)
    )
    crossing = sum(
      n for (axis, a, b, _), n in lines.items() if axis == "node" and a != b
    )
    assert crossing < flat if kind != "same" or nodes < 4 else crossing <= flat


@pytest.mark.parametrize(("ranks", "nodes"), [(1, 1), (4, 1), (8, 2)])
def test_steps_are_what_dispatch_and_combine_are_made_of(ranks, nodes):
  """As FP8 training uses them; narrow types survive the way."""
  x, experts, gates = inputs(ranks, "skewed")

  def check(make_plan, x, experts, gates):
    plan = make_plan(experts)
    codes = x.astype(jnp.float8_e4m3fn)
    codes_C, x_C, gates_C = d.arrive([codes, x, gates], plan)
    rows, row_gates = d.expand(x_C, plan), d.expand_gates(gates_C, plan)
    wide = d.expand(codes_C, plan).astype(x.dtype)
    same = [
      jnp.array_equal(rows, d.dispatch(x, gates, plan)[0]),
      jnp.array_equal(row_gates, d.dispatch(x, gates, plan)[1]),
      jnp.array_equal(wide, d.dispatch(codes.astype(x.dtype), gates, plan)[0]),
      jnp.array_equal(d.go_home(d.collapse(rows, plan), plan), d.combine(rows, plan)),
      jnp.array_equal(d.go_home(d.collapse_gates(row_gates, plan), plan), gates),
    ]
    return jnp.stack(same)[None]

  assert np.all(on_ranks(ranks, math.inf, check, nodes)(x, experts, gates))


def test_bounds():
  assert d.arrival_bound(100, 8, 4, math.inf) == 400
  assert d.arrival_bound(100, 1, 4, 1.0) == 100
  assert d.arrival_bound(100, 8, 4, 1.25) == 400  # 1.25 x 360 tokens, of 400
  assert d.row_bound(100, 8, 4, 64, 1.0) == 800
  assert d.row_bound(100, 8, 4, 2, math.inf) == 800  # two local experts at most
  assert d.row_bound(100, 8, 4, 2, 8.0) == 800


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32])
def test_rows_are_taken_in_words_on_gpus(dtype, monkeypatch):
  """Bit for bit, NaN included, zero past the end; odd widths too."""
  source = jnp.array([3, 0, 7, 5, 5, 6])
  for width in (8, 6, 3):
    x = jax.random.normal(jax.random.key(width), (7, width)).astype(dtype)
    x = x.at[0, 1].set(jnp.nan)
    want = np.asarray(d._take(x, source))
    with monkeypatch.context() as patch:
      patch.setattr(d, "target_platform", lambda: "gpu")
      got = np.asarray(jax.jit(d._take)(x, source))
      words = "bitcast" in str(jax.make_jaxpr(lambda *a: d._take(*a))(x, source))
    assert words == (dtype != jnp.float32 and width * x.dtype.itemsize % 4 == 0)
    assert got.tobytes() == want.tobytes()
    assert not want[2].any()
