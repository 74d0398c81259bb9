"""The optimizer step: one shard_map over the whole mesh.

Gather the compute weights once, scan micro-batches accumulating local FP32 gradients
and integer expert counts, scatter once, clip, AdamW on the shard, move the router
bias. A step whose loss or gradient is not finite, or whose dispatch overflowed, leaves
the state as it was and says so in its metrics. DeepSeek-V3 report, sections 2.1.2,
3.2 and 4.2.

`check_vma=False`: gradients are taken inside and stay local until they are scattered,
which JAX's tracking of replicated values would sum on its own, and Pallas kernels do
not trace under it in interpret mode.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import Config
from deepseek_jax.mesh import BATCH_AXES, split_axes
from deepseek_jax.model.layers import (
  RouterBias,
  gradient_targets,
  is_variable,
  named_variables,
  quantize_for_compute,
  with_gradient_targets,
)
from deepseek_jax.model.moe import Execution
from deepseek_jax.model.router import updated_bias
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel import zero
from deepseek_jax.precision.tiles import Recipe
from deepseek_jax.train.loss import LossParts, loss_parts, loss_weights
from deepseek_jax.train.optimizer import adamw

Arrays = dict[str, jax.Array]
BATCH_SPEC = P(None, BATCH_AXES)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  """What a run is, besides its data iterator; names are parameter paths."""

  step: jax.Array  # int32: updates applied
  params: Arrays  # FP32 masters
  mu: Arrays
  nu: Arrays
  bias: Arrays  # router biases, FP32


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Scalars:
  """What schedules decide for one step."""

  learning_rate: Any
  bias_update_rate: Any
  mtp_weight: Any
  # Whether a step before it overflowed: then this one is not applied either, and
  # reports the overflow on. So steps may be dispatched before the last one is known.
  blocked: Any = False


@dataclasses.dataclass(frozen=True)
class Blueprint:
  """The model's shapes and how each parameter lies on the mesh."""

  skeleton: Transformer  # of jax.ShapeDtypeStruct
  layouts: dict[str, zero.Layout]
  compute_dtype: Any
  fp8: Recipe | None

  @staticmethod
  def of(config: Config, mesh: Mesh) -> "Blueprint":
    skeleton = jax.eval_shape(lambda: Transformer(config.model, jax.random.key(0)))
    layouts = {
      name: zero.plan_layout(
        v.shape, v.get_metadata()["spec"], mesh, split=isinstance(v, nnx.Param)
      )
      for name, v in named_variables(skeleton).items()
    }
    dtype = jnp.float32 if config.precision == "fp32" else jnp.bfloat16
    fp8 = None
    if config.precision.startswith("fp8"):
      fp8 = Recipe(config.fp8, emulated=config.precision == "fp8_emulated")
    return Blueprint(skeleton, layouts, dtype, fp8)

  def dtype_of(self, variable: nnx.Variable) -> Any:
    high = variable.get_metadata().get("high_precision", False)
    return jnp.float32 if high else self.compute_dtype

  def assemble(self, arrays: Arrays) -> Transformer:
    """A model of the given arrays, by path."""
    variables = named_variables(self.skeleton)
    treedef = jax.tree.structure(self.skeleton, is_leaf=is_variable)
    filled = [v.replace(arrays[name]) for name, v in variables.items()]
    return jax.tree.unflatten(treedef, filled)

  def gather(self, params: Arrays, bias: Arrays) -> Transformer:
    """The compute weights of this device; inside shard_map."""
    variables = named_variables(self.skeleton)
    whole = {
      name: zero.gather_weight(x, self.layouts[name], self.dtype_of(variables[name]))
      for name, x in params.items()
    }
    return self.assemble({**whole, **bias})

  def compute_weights(self, state: TrainState) -> Transformer:
    """What training multiplies with: `gather`, then FP8 if that is the precision.

    Weights travel in BF16 and are rounded to FP8 after that, so that blocks of 128x128
    need not respect shards and a run is the same on every mesh.
    """
    model = self.gather(state.params, state.bias)
    return quantize_for_compute(model, self.fp8) if self.fp8 else model

  def names(self, kind: type) -> list[str]:
    named = named_variables(self.skeleton)
    return [name for name, v in named.items() if type(v) is kind]

  def compute_specs(self) -> Transformer:
    """A model whose leaves are the PartitionSpecs of compute."""
    specs: dict[str, Any] = {n: x.compute for n, x in self.layouts.items()}
    return self.assemble(specs)


def state_specs(blueprint: Blueprint) -> TrainState:
  """PartitionSpecs of the state at rest."""
  layouts = blueprint.layouts
  stored: dict[str, Any] = {n: layouts[n].stored for n in blueprint.names(nnx.Param)}
  bias: dict[str, Any] = {n: layouts[n].stored for n in blueprint.names(RouterBias)}
  step: Any = P()
  return TrainState(step, stored, dict(stored), dict(stored), bias)


def _initial(config: Config, key: jax.Array) -> TrainState:
  variables = named_variables(Transformer(config.model, key))
  arrays = {n: v[...] for n, v in variables.items() if isinstance(v, nnx.Param)}
  bias = {n: v[...] for n, v in variables.items() if isinstance(v, RouterBias)}
  dtype = jnp.dtype(config.train.moment_dtype)
  mu, nu = ({n: jnp.zeros(a.shape, dtype) for n, a in arrays.items()} for _ in "mv")
  return TrainState(jnp.zeros((), jnp.int32), arrays, mu, nu, bias)


def _shardings(config: Config, mesh: Mesh) -> TrainState:
  specs = state_specs(Blueprint.of(config, mesh))
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda s: isinstance(s, P)
  )


def init_state(config: Config, mesh: Mesh) -> TrainState:
  """Fresh parameters from `config.seed`, the same on every mesh, made in shards."""
  # Drawing is cheap and its code is large: on a CPU optimising it takes half a minute.
  cpu = mesh.devices.flat[0].platform == "cpu"
  make = jax.jit(
    functools.partial(_initial, config),
    out_shardings=_shardings(config, mesh),
    compiler_options={"xla_backend_optimization_level": 0} if cpu else None,
  )
  return make(jax.random.key(config.seed))


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
  """Shapes, dtypes and shardings of the state, without making it."""
  shapes = jax.eval_shape(
    functools.partial(_initial, config), jax.random.key(config.seed)
  )
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    _shardings(config, mesh),
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of [micro-batches, sequences, tokens]."""
  return NamedSharding(mesh, BATCH_SPEC)


def execution(config: Config, mesh: Mesh, capacity: float) -> Execution:
  return Execution(
    expert_axes=split_axes(mesh),
    capacity=capacity,
    remat=config.train.remat,
    balance=config.train.balance,
  )


def make_train_step(config: Config, mesh: Mesh, capacity: float) -> Callable:
  """Compiles lazily: (state, batch, scalars) -> (state, metrics); donates the state.

  `batch` is {"tokens": int32 [micro-batches, sequences, T+1]}, with "segments" of the
  same shape to keep documents apart, sharded by `batch_sharding`. `capacity` bounds
  dispatch (see parallel/dispatch.py).
  """
  blueprint = Blueprint.of(config, mesh)
  specs = state_specs(blueprint)
  body = functools.partial(
    _local_step, config, blueprint, execution(config, mesh, capacity)
  )
  step = jax.shard_map(
    body,
    mesh=mesh,
    in_specs=(specs, BATCH_SPEC, P()),
    out_specs=(specs, P()),
    check_vma=False,
  )
  # Said outright, or jit forgets axes of size 1 and the second call compiles again.
  out = (_shardings(config, mesh), NamedSharding(mesh, P()))
  return jax.jit(step, donate_argnums=0, out_shardings=out)


def _local_step(config, blueprint, run, state: TrainState, batch, scalars: Scalars):
  t = config.train
  model = blueprint.compute_weights(state)
  gradients, parts, tokens = _accumulate(model, batch, scalars, run)
  gradients = {
    name: zero.scatter_gradient(gradients[name], blueprint.layouts[name])
    for name in state.params
  }
  norm = zero.global_norm(gradients, blueprint.layouts)
  parts = reduce_parts(parts)
  parts = dataclasses.replace(parts, overflow=parts.overflow | scalars.blocked)
  finite = jnp.isfinite(norm) & jnp.isfinite(parts.main + parts.mtp + parts.balance)
  applied = finite & ~parts.overflow
  scale = jnp.minimum(1.0, t.clip_norm / jnp.maximum(norm, 1e-30))
  new = _update(config, blueprint, state, gradients, scale, parts, scalars)
  state = jax.tree.map(lambda a, b: jnp.where(applied, a, b), new, state)
  metrics = summarise(parts, batch, tokens) | {
    "grad_norm": norm,
    "finite": finite,
    "applied": applied,
  }
  return state, metrics


def _accumulate(model, batch, scalars, run):
  """Local FP32 gradients of the global mean loss, and local sums of its parts."""
  tokens = target_count(batch)
  sequences = batch["tokens"].shape[0] * batch["tokens"].shape[1]
  sequences *= lax.axis_size(BATCH_AXES)

  def objective(targets, micro):
    weights = with_gradient_targets(model, targets)
    parts = loss_parts(weights, micro["tokens"], micro.get("segments"), run)
    nats = (parts.main + scalars.mtp_weight * parts.mtp) / tokens
    return nats + parts.balance / sequences, parts

  def one(micro):
    targets = gradient_targets(model)
    gradients, parts = jax.grad(objective, has_aux=True)(targets, micro)
    named = named_variables(gradients).items()
    return {name: v[...].astype(jnp.float32) for name, v in named}, parts

  if batch["tokens"].shape[0] == 1:
    gradients, parts = one(jax.tree.map(lambda x: x[0], batch))
    return gradients, parts, tokens

  def add(total, micro):
    return _add(total, one(micro)), None

  first = jax.tree.map(lambda x: x[0], batch)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first)
  )
  (gradients, parts), _ = lax.scan(add, zeros, batch)
  return gradients, parts, tokens


def _add(a, b):
  return jax.tree.map(lambda x, y: x | y if x.dtype == bool else x + y, a, b)


def target_count(batch: Arrays) -> jax.Array:
  """Tokens that the main loss of the whole global batch predicts, FP32."""
  shape = batch["tokens"].shape
  segments = batch.get("segments")
  if segments is None:
    count = jnp.float32(shape[0] * shape[1] * (shape[2] - 1))
  else:
    flat = segments.reshape(-1, shape[2])
    count = loss_weights(flat, flat.shape, 1).sum()
  return lax.psum(count, BATCH_AXES)


def reduce_parts(parts: LossParts) -> LossParts:
  """Sums over the ranks that hold different sequences."""
  wide = dataclasses.replace(parts, overflow=parts.overflow.astype(jnp.int32))
  total = lax.psum(wide, BATCH_AXES)
  return dataclasses.replace(total, overflow=total.overflow > 0)


def summarise(parts: LossParts, batch: Arrays, tokens: jax.Array) -> dict:
  """Means over the global batch, from sums over it."""
  sequences = batch["tokens"].shape[0] * batch["tokens"].shape[1]
  sequences *= lax.axis_size(BATCH_AXES)
  routed = sequences * (batch["tokens"].shape[2] - 1)
  return {
    "loss": parts.main / tokens,
    "mtp_loss": parts.mtp / tokens,
    "balance_loss": parts.balance / sequences,
    "counts": parts.counts_LE,
    "entropy": parts.entropy_L / routed,
    "copies": parts.copies_LS / routed,
    "overflow": parts.overflow,
    "tokens": tokens,
  }


def _update(config, blueprint, state, gradients, scale, parts, scalars) -> TrainState:
  t = config.train
  variables = named_variables(blueprint.skeleton)
  count = state.step + 1
  params, mu, nu = {}, {}, {}
  for name, parameter in state.params.items():
    meta = variables[name].get_metadata()
    spared = meta.get("norm") or meta.get("bias")  # gains and biases
    params[name], mu[name], nu[name] = adamw(
      parameter,
      gradients[name] * scale,
      state.mu[name],
      state.nu[name],
      count=count,
      learning_rate=scalars.learning_rate,
      decay=t.decay_norms or not spared,
      config=t,
    )
  bias, layer = {}, 0
  for name in blueprint.names(RouterBias):  # as counts stand: MTP's last
    old = state.bias[name]
    n = old.shape[0] if old.ndim == 2 else 1
    counts = parts.counts_LE[layer : layer + n].reshape(old.shape)
    bias[name] = updated_bias(old, counts, scalars.bias_update_rate)
    layer += n
  return TrainState(count, params, mu, nu, bias)


def make_eval_step(config: Config, mesh: Mesh, capacity: float) -> Callable:
  """(state, batch) -> metrics of the losses, without gradients; see make_train_step."""
  blueprint = Blueprint.of(config, mesh)
  run = dataclasses.replace(execution(config, mesh, capacity), remat="none")

  def local(state: TrainState, batch):
    model = blueprint.compute_weights(state)

    def one(total, micro):
      parts = loss_parts(model, micro["tokens"], micro.get("segments"), run)
      return _add(total, parts), None

    first = jax.tree.map(lambda x: x[0], batch)
    shapes = jax.eval_shape(
      lambda m: loss_parts(model, m["tokens"], m.get("segments"), run), first
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    parts = reduce_parts(lax.scan(one, zeros, batch)[0])
    return summarise(parts, batch, target_count(batch))

  return jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(state_specs(blueprint), BATCH_SPEC),
      out_specs=P(),
      check_vma=False,
    )
  )


def make_gather(config: Config, mesh: Mesh) -> Callable[[Arrays, Arrays], Transformer]:
  """(params, bias) of a state -> the model in compute precision, split as in compute.

  For generation.
  """
  blueprint = Blueprint.of(config, mesh)
  specs = state_specs(blueprint)
  return jax.jit(
    jax.shard_map(
      blueprint.gather,
      mesh=mesh,
      in_specs=(specs.params, specs.bias),
      out_specs=blueprint.compute_specs(),
      check_vma=False,
    )
  )
