"""An exponential moving average of the weights, kept in host memory.

DeepSeek-V3 report, section 3.2.2: the average lives on the CPU and is updated
asynchronously after each step, so it costs the device no memory and no time. Here
the device makes a copy of the weights (the step donates the originals), and a thread
fetches the copy and folds it in:

    average = decay * average + (1 - decay) * weights          in FP32 (or wider)

Every process keeps only the shards its own devices hold.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The shards of one array that this process holds: {slices as text: values}.
_Shards = dict[str, np.ndarray]


@jax.jit
def device_copy(tree: Any) -> Any:
  """A copy that outlives the donation of `tree` to the next step."""
  return jax.tree.map(jnp.copy, tree)


class Ema:
  """The average of a tree of arrays, started at its present values."""

  def __init__(self, decay: float, tree: Any):
    """`tree` holds the weights at the start, or a restored average."""
    self._decay = np.float32(decay)
    self._leaves, self._structure = jax.tree.flatten(jax.tree.map(_fetch, tree), _leaf)
    self._specs = [(leaf.shape, leaf.sharding) for leaf in jax.tree.leaves(tree)]
    self._thread = ThreadPoolExecutor(1, thread_name_prefix="ema")
    self._running: Future[None] | None = None

  def update(self, copy: Any) -> None:
    """Folds in `copy`, made by `device_copy`, in a thread.

    Waits for the update before, so that at most two copies are alive.
    """
    self.wait()
    self._running = self._thread.submit(self._fold, jax.tree.leaves(copy))

  def wait(self) -> None:
    """Blocks until the update under way is done, and raises its error if any."""
    running, self._running = self._running, None
    if running is not None:
      running.result()

  def arrays(self) -> Any:
    """The average as arrays placed like the weights, to be saved or evaluated."""
    self.wait()
    leaves = [
      jax.make_array_from_callback(
        shape, sharding, lambda index, shards=shards: shards[_key(index)].copy()
      )
      for shards, (shape, sharding) in zip(self._leaves, self._specs)
    ]
    return jax.tree.unflatten(self._structure, leaves)

  def close(self) -> None:
    self.wait()
    self._thread.shutdown()

  def _fold(self, copies: list[jax.Array]) -> None:
    rest = np.float32(1) - self._decay
    for shards, copy in zip(self._leaves, copies):
      for key, new in _fetch(copy).items():
        shards[key] = self._decay * shards[key] + rest * new


def _fetch(array: jax.Array) -> _Shards:
  found: _Shards = {}
  for shard in array.addressable_shards:
    key = _key(shard.index)
    if key not in found:
      found[key] = np.array(shard.data)  # a copy: the device's buffer may be reused
  return found


def _key(index: Any) -> str:
  return str(index)


def _leaf(value: Any) -> bool:
  """Stops a flattening at the shards of one array."""
  return isinstance(value, dict) and all(
    isinstance(shard, np.ndarray) for shard in value.values()
  )
