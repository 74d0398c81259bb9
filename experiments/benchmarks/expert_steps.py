"""Each step of a run twice: on one device, and with the expert axis over several.

    python -m experiments.benchmarks.expert_steps --run runs/one_gpu --expert 2 \
      --steps 200 [--micro_batch 8] [--frozen]

Takes config, tokenizer and tokens of a workdir, starts afresh from its seed, and takes
every step on both meshes from one and the same state, that after the step on one
device. So roundings do not add up over steps, and what differs is one step's own.
Prints the largest and the mean relative differences of losses and gradient norms, how
many choices of experts moved, how many updates of router biases were the same, and
whether every bias is what the rule makes of the counts over all ranks. For the others
it says how far from the mean load their experts were: sums in BF16 over ranks move a
few tokens between near-equal experts, which can take a count across the mean.

`--frozen` sets the learning rate to 0, so that only biases move.
"""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from deepseek_jax.config import Config, MeshConfig
from deepseek_jax.data.pipeline import make_data
from deepseek_jax.io import workdir
from deepseek_jax.mesh import make_mesh
from deepseek_jax.model.router import updated_bias
from deepseek_jax.train import step
from deepseek_jax.train.batches import next_batch, rows_of_micro_batch
from deepseek_jax.train.schedule import Recipe

LOSSES = ("loss", "mtp_loss", "balance_loss", "grad_norm")


class OneMesh:
  """The training step on the first devices; capacity without bound."""

  def __init__(self, config: Config, expert: int):
    self.config = dataclasses.replace(config, mesh=MeshConfig(expert=expert))
    self.mesh = make_mesh(expert=expert, devices=jax.devices()[:expert])
    self.rows = rows_of_micro_batch(self.config, self.mesh)
    abstract = step.abstract_state(self.config, self.mesh)
    self.places = jax.tree.map(lambda x: x.sharding, abstract)
    self._step = step.make_train_step(self.config, self.mesh, math.inf)

  def __call__(self, state: step.TrainState, tokens: np.ndarray, scalars: step.Scalars):
    """The state after the step, and its metrics on the host; donates the state."""
    shaped = tokens.reshape(-1, self.rows, tokens.shape[-1])
    batch = {"tokens": jax.device_put(shaped, step.batch_sharding(self.mesh))}
    state, found = self._step(state, batch, scalars)
    return state, jax.device_get(found)


def biases(state: step.TrainState) -> np.ndarray:
  """Of all layers, [layers, experts], in the order of the counts."""
  return np.concatenate([np.atleast_2d(jax.device_get(b)) for b in state.bias.values()])


def compare_step(before, states, metrics, rate: float) -> dict[str, Any]:
  """What one step did on both meshes.

  Args:
    before: biases before it.
    states, metrics: after it, on one device and on several.
    rate: of the update of biases.
  """
  (one, many), (found, other) = states, metrics
  after, others = biases(one), biases(many)
  same = after == others
  counts, moved = found["counts"], np.abs(found["counts"] - other["counts"])
  distance = np.abs(counts - counts.mean(axis=1, keepdims=True))
  by_rule = [
    np.array_equal(updated_bias(before, m["counts"], jnp.float32(rate)), b)
    for m, b in ((found, after), (other, others))
  ]
  return {
    **{name: abs(other[name] / found[name] - 1) for name in LOSSES},
    "moved": moved.sum() / 2 / counts.sum(),
    "same": int(same.sum()),
    "biases": same.size,
    "distance": distance[~same].max(initial=0) / counts.mean(),
    "by_rule": all(by_rule),
    "applied": bool(found["applied"] and other["applied"]),
  }


def take_steps(
  config: Config, folder: Path, expert: int, steps: int, frozen: bool
) -> list[dict[str, Any]]:
  """The comparison of each step."""
  one, many = OneMesh(config, 1), OneMesh(config, expert)
  data = make_data(config, folder)
  recipe = Recipe(config.train, many.rows)
  state, found, tokens = step.init_state(one.config, one.mesh), [], 0
  for _ in tqdm(range(steps)):
    values = recipe.at(tokens)
    batch = next_batch(data.train, values.batch_size, many.rows, one.mesh)["tokens"]
    batch = np.asarray(batch).reshape(values.batch_size, -1)
    tokens += values.batch_size * config.train.seq_len
    scalars = step.Scalars(
      np.float32(0 if frozen else values.learning_rate),
      np.float32(values.bias_update_rate),
      np.float32(values.mtp_weight),
      np.False_,
    )
    before = biases(state)
    copy = jax.tree.map(lambda x, s: jax.device_put(x, s), state, many.places)
    copy = jax.tree.map(lambda x: x.copy(), copy)  # a buffer of its own, to be donated
    split, other = many(copy, batch, scalars)
    state, mine = one(state, batch, scalars)
    rate = values.bias_update_rate
    found.append(compare_step(before, (state, split), (mine, other), rate))
  return found


def describe(found: list[dict[str, Any]]) -> str:
  lines = [f"{len(found)} steps, {sum(f['applied'] for f in found)} applied on both"]
  for name in LOSSES:
    values = [f[name] for f in found]
    lines.append(
      f"{name}: relative difference {np.mean(values):.1e} on average, "
      f"{max(values):.1e} at most, at step {int(np.argmax(values)) + 1}"
    )
  same, biases = (sum(f[name] for f in found) for name in ("same", "biases"))
  whole = sum(f["same"] == f["biases"] for f in found)
  lines += [
    f"choices of experts: {100 * np.mean([f['moved'] for f in found]):.4f}% moved",
    f"updates of biases: {same} of {biases} the same, all of them in {whole} steps; "
    f"the others' loads within {100 * max(f['distance'] for f in found):.3f}% of the "
    "mean load",
    "biases are the rule's for the counts of all ranks: "
    + ("in every step" if all(f["by_rule"] for f in found) else "NOT ALWAYS"),
  ]
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--run", required=True, type=Path, help="workdir")
  parser.add_argument("--expert", type=int, default=2, help="size of the expert axis")
  parser.add_argument("--steps", type=int, default=200)
  parser.add_argument("--micro_batch", type=int, help="sequences of a device at once")
  parser.add_argument("--frozen", action="store_true", help="learning rate 0")
  args = parser.parse_args()
  config = workdir.read(args.run)
  micro = args.micro_batch or config.train.batch_size // args.expert
  train = dataclasses.replace(
    config.train, micro_batch_size=micro, steps=max(args.steps, config.train.steps)
  )
  config = dataclasses.replace(config, train=train)
  device = f"{args.expert} x {jax.devices()[0].device_kind}"
  print(f"{device}, jax {jax.__version__}, {config.model.name}, {config.precision}")
  found = take_steps(config, args.run, args.expert, args.steps, args.frozen)
  print(describe(found))


if __name__ == "__main__":
  main()
