"""The TPU's all-to-all without a TPU: interpreted over simulated devices, with race
detection, and compiled for real topologies."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import all_to_all as a2a
from kernels_pallas.all_to_all import tpu
from tests import tpu_topology
from tests.kernels_pallas import test_all_to_all as suite

AXIS = suite.AXIS
on_cpus = pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="simulates its devices on CPUs"
)


RACE = "RACE DETECTED"  # as JAX prints (0.11) or logs (0.12) it


@pytest.fixture
def in_its_place(monkeypatch):
  """Puts an interpreted kernel in the reference's place for the suite's bodies."""

  def put(send_rows, **how):
    params = pltpu.InterpretParams(detect_races=True, **how)
    kernel = functools.partial(send_rows, interpret=params)
    monkeypatch.setattr(a2a.reference, "send_rows", kernel)
    suite.on_ranks.cache_clear()

  yield put
  suite.on_ranks.cache_clear()
  pltpu.reset_tpu_interpret_mode_state()


@pytest.fixture
def interpreted(in_its_place, capfd, caplog):
  in_its_place(tpu.send_rows)
  yield
  assert RACE not in caplog.text + "".join(capfd.readouterr())


@on_cpus
@pytest.mark.parametrize(("ranks", "kind"), [(4, "skewed"), (8, "empty")])
def test_there_and_back_interpreted(interpreted, ranks, kind):
  suite.test_rows_arrive_in_deepeps_order_and_sum_without_weights(
    "reference", ranks, kind, jnp.float32
  )


@on_cpus
def test_codes_and_scales_interpreted(interpreted):
  suite.test_codes_and_scales_travel_together("reference", 2)


@on_cpus
def test_decoding_interpreted(interpreted):
  suite.test_decoding_lays_rows_out_by_local_expert("reference", 2, "uniform")


@on_cpus
def test_steps_of_a_scan_interpreted(interpreted):
  suite.test_steps_of_a_scan_do_not_see_each_other("reference", 2)


@on_cpus
def test_several_axes_interpreted(interpreted):
  suite.test_several_axes_are_one("reference")


@on_cpus
def test_not_waiting_for_rows_is_a_race(in_its_place, capfd, caplog):
  """The detector sees what the tests above rely on it to see."""

  def impatient(values, address, count, received, *rest, **options):
    return tpu.send_rows(values, address, count, 0 * received, *rest, **options)

  in_its_place(impatient, dma_execution_mode="eager")
  x, experts = suite.tokens_of(2), suite.choices("skewed", 2)
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    jax.block_until_ready(
      suite.on_ranks(suite.there_and_back, "reference", 2)(x, experts)
    )
  with contextlib.suppress(jax.errors.JaxRuntimeError, ExceptionGroup):
    jax.effects_barrier()  # or what failed would be reported at exit
  assert RACE in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "tpu7x:2x2x1"])
def test_compiles_for_tpu_topologies(topology):
  """Training with gradients, FP8 codes with scales, and decoding, at V3's width; a mesh
  of TPUs picks the TPU's kernel by itself."""
  devices = tpu_topology.devices(topology)
  ranks, tokens = 4, 64
  mesh = Mesh(np.array(devices[:ranks]), (AXIS,))

  def step(x, codes, scales, experts):
    route = a2a.plan_ranks(experts // 64, 2 * tokens, AXIS)
    y, pull = jax.vjp(lambda x: a2a.combine(a2a.dispatch(x, route), route), x)
    sent = a2a.send_rows(
      [codes, scales],
      route.address_MA,
      tokens,
      route.counts_L.sum(),
      rows=route.rows,
      axis=AXIS,
    )
    decoding = a2a.plan_experts(experts, 64, 128, AXIS)
    return pull(y)[0], sent, a2a.combine(a2a.dispatch(x, decoding), decoding)

  shapes = [
    ((ranks * tokens, 7168), jnp.bfloat16),
    ((ranks * tokens, 7168), jnp.float8_e4m3fn),
    ((ranks * tokens, 56), jnp.float32),
    ((ranks * tokens, 8), jnp.int32),
  ]
  args = [
    jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, P(AXIS)))
    for shape in shapes
  ]
  local = jax.shard_map(
    step, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False
  )
  compiled = jax.jit(local).lower(*args).compile()
  assert compiled.as_text().count("tpu_custom_call") >= 6
