"""The moving average on the host against NumPy, and its way through a checkpoint."""

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.mesh import make_mesh
from deepseek_jax.train.ema import Ema, device_copy

DECAY = np.float32(0.9)


def _weights(step: int, devices: int):
  mesh = make_mesh(data=devices, devices=jax.devices()[:devices])
  key = jax.random.key(step)
  return {
    "split": jax.device_put(
      jax.random.normal(key, (8, 5)), NamedSharding(mesh, P("data"))
    ),
    "whole": jax.device_put(jax.random.normal(key, (3,)), NamedSharding(mesh, P())),
  }


def _expected(steps: int):
  average = jax.tree.map(np.asarray, _weights(0, 1))
  for step in range(1, steps + 1):
    new = jax.tree.map(np.asarray, _weights(step, 1))
    average = jax.tree.map(
      lambda a, b: DECAY * a + (np.float32(1) - DECAY) * b, average, new
    )
  return average


def _assert_equal(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), y), a, b)


def test_average_is_numpys_on_any_mesh():
  for devices in (1, min(4, len(jax.devices()))):
    ema = Ema(0.9, _weights(0, devices))
    for step in range(1, 5):
      ema.update(device_copy(_weights(step, devices)))
    found = ema.arrays()
    ema.close()
    _assert_equal(found, _expected(4))
    assert found["split"].sharding == _weights(0, devices)["split"].sharding


def test_arrays_do_not_change_when_training_goes_on():
  """They may still be on their way to disk when the next update comes."""
  ema = Ema(0.9, _weights(0, 1))
  ema.update(device_copy(_weights(1, 1)))
  saved = ema.arrays()
  for step in range(2, 5):
    ema.update(device_copy(_weights(step, 1)))
  ema.wait()
  _assert_equal(saved, _expected(1))
  resumed = Ema(0.9, saved)
  for step in range(2, 5):
    resumed.update(device_copy(_weights(step, 1)))
  _assert_equal(resumed.arrays(), _expected(4))
  ema.close()
  resumed.close()


def test_copy_outlives_donation():
  weights = _weights(1, 1)
  before = jax.tree.map(lambda x: np.array(x), weights)
  copy = device_copy(weights)
  consume = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
  consume(weights)
  _assert_equal(copy, before)
