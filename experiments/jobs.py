"""The jobs of `experiments.run`, each a short function."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Config
from deepseek_jax.data.chat import ChatTokenizer, load_tokenizer
from deepseek_jax.data.pipeline import make_data
from deepseek_jax.infer.fp8 import in_fp8
from deepseek_jax.infer.generate import generate_text
from deepseek_jax.infer.placement import expert_ranks, place_experts
from deepseek_jax.io import workdir
from deepseek_jax.io.checkpoint import Restored, restore_newest
from deepseek_jax.io.hf_import import assemble, compute_targets, make_skeleton
from deepseek_jax.io.placement import read_placement, routed_shape, write_placement
from deepseek_jax.io.weights import restore_weights
from deepseek_jax.mesh import make_mesh
from deepseek_jax.parallel.eplb import gpu_loads, one_of_each, rebalance_experts
from deepseek_jax.precision.tiles import Recipe
from deepseek_jax.train import loop, step
from deepseek_jax.train.evaluation import Evaluation, measure_loads
from deepseek_jax.train.finish import write_samples
from deepseek_jax.train.metrics import max_violation
from deepseek_jax.train.plots import plot_gpu_load


def pretrain(config: Config, folder: str) -> None:
  """Trains from scratch, or on from the newest checkpoint in `folder`."""
  _keep_programs(folder)
  loop.train(config, folder)


def generate(config: Config, folder: str) -> None:
  """Completes the prompts with the newest checkpoint of a training workdir."""
  source = Path(config.generate.checkpoint or folder)
  key = jax.random.key(config.seed)  # of sampling; the run's seed cut its data
  if not config.generate.prompts:
    raise ValueError("generate.prompts is empty: give some text to complete")
  config = _as_trained(config, source)
  mesh = make_mesh(**dataclasses.asdict(config.mesh))
  tokenizer, template = load_tokenizer(source), None
  if config.generate.chat != "off":
    template = ChatTokenizer.from_folder(source).template
  placement = None
  if path := config.generate.placement:
    placement = read_placement(path, config.model, expert_ranks(mesh))
  skeleton = make_skeleton(config.model)
  dtype = jnp.float32 if config.precision == "fp32" else jnp.bfloat16
  targets = compute_targets(skeleton, mesh, dtype)
  number, arrays = restore_weights(source, skeleton, targets)
  model = assemble(skeleton, arrays)
  del arrays
  if placement is not None:
    model = place_experts(model, placement, mesh)
  if config.generate.fp8:
    recipe = Recipe(config.fp8, emulated=config.precision == "fp8_emulated")
    model = in_fp8(model, mesh, recipe)
  texts = generate_text(
    model,
    config,
    tokenizer,
    config.generate.prompts,
    config.generate,
    template=template,
    mesh=mesh,
    key=key,
  )
  if jax.process_index() == 0:
    path = Path(folder) / "samples" / f"generated_{number}.txt"
    print(write_samples(config.generate.prompts, texts, path).read_text("utf-8"))
    print(f"checkpoint: {source / 'checkpoints' / str(number)}")
    print(f"samples:    {path}")


def evaluate(config: Config, folder: str) -> None:
  """Validation loss and bits per byte of a training workdir's newest checkpoint."""
  source = Path(config.generate.checkpoint or folder)
  config = _as_trained(config, source)
  mesh = make_mesh(**dataclasses.asdict(config.mesh))
  found = _restore(source, vars(step.abstract_state(config, mesh)))
  data = make_data(config, source)
  values = Evaluation(config, mesh, data)(step.TrainState(**found.state))
  if not values:
    raise ValueError("data.validation_fraction=0 leaves nothing to evaluate on")
  if jax.process_index() == 0:
    print(json.dumps({"step": found.step, **values}))


def rebalance(config: Config, folder: str) -> None:
  """Places redundant experts by the loads of a training run's newest checkpoint."""
  source, settings = Path(config.generate.checkpoint or folder), config.rebalance
  config = _as_trained(config, source)
  layers, experts = routed_shape(config.model)
  if config.job == "import" or not layers:
    raise ValueError(
      f"{source} is no training run of a model with routed experts: loads are measured "
      "on the data of one"
    )
  settings.check(experts)
  mesh = make_mesh(**dataclasses.asdict(config.mesh))
  found = _restore(source, vars(step.abstract_state(config, mesh)))
  state, data = step.TrainState(**found.state), make_data(config, source)
  # Placed by what was measured first, judged by what came after.
  first_LE, then_LE = measure_loads(config, mesh, data, state, parts=2)
  placement = rebalance_experts(
    first_LE,
    experts + settings.redundant_experts,
    config.model.n_expert_groups,
    settings.nodes,
    settings.gpus,
  )
  if jax.process_index():
    return
  before, after = (
    gpu_loads(then_LE, placed, settings.gpus)
    for placed in (one_of_each(layers, experts), placement)
  )
  file, plot = Path(folder) / "placement.json", Path(folder) / "plots/gpu_load.png"
  newest = source / "checkpoints" / str(found.step)
  write_placement(file, placement, first_LE, settings, measured=str(newest))
  copies = f"{settings.redundant_experts} redundant experts"
  plot_gpu_load({"each expert once": before, copies: after}, plot)
  print(f"load of the fullest of {settings.gpus} GPUs / mean load, {layers} layers:")
  print(f"each expert once: {_fullest(before)}")
  print(f"{copies}: {_fullest(after)}")
  print(f"checkpoint: {newest}")
  print(f"placement:  {file}")
  print(f"plot:       {plot}")


def _fullest(load_LG: np.ndarray) -> str:
  over_L = 1 + np.array(max_violation(load_LG))
  return f"{over_L.mean():.3f} on average, {over_L.max():.3f} in the worst layer"


def _as_trained(config: Config, source: Path) -> Config:
  """The training run's config, cut for this job's mesh and with its prompts."""
  trained = workdir.read(source)
  train = dataclasses.replace(
    trained.train,
    micro_batch_size=config.train.micro_batch_size,
    eval_batches=config.train.eval_batches,
    capacities=config.train.capacities,
  )
  return dataclasses.replace(
    trained, mesh=config.mesh, train=train, generate=config.generate
  )


def _restore(source: Path, abstract: dict[str, Any]) -> Restored:
  found = restore_newest(source / "checkpoints", abstract)
  if found is None:
    raise FileNotFoundError(f"{source} has no checkpoint yet: train there first")
  return found


def _keep_programs(folder: str) -> None:
  """Keeps compiled programs in the workdir of a run on an accelerator.

  A run that goes on then starts at once, and with the very same kernels: compiled
  again, an autotuner might choose others, which round otherwise. On CPUs, where
  nothing is tuned, compiled code may not fit the next machine.
  """
  if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(Path(folder) / "programs"))
