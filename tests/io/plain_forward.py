"""A forward pass from an Orbax export with JAX and Orbax alone, as README.md says.

    python plain_forward.py FOLDER OUT.npy TOKENS.npy

A program on its own: it stands for another project, and cannot import this one.
"""

import json
import math
import pathlib
import sys

for package in ("deepseek_jax", "kernels_pallas", "experiments", "flax"):
  sys.modules[package] = None  # importing any of them is an ImportError

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_default_matmul_precision", "highest")


def restore(folder):
  """Parameters by dotted name on a mesh of four devices, FP8 multiplied out."""
  metadata = json.loads((folder / "metadata.json").read_text())
  mesh = jax.make_mesh((4,), ("devices",))
  tree = {}
  for name, about in metadata["parameters"].items():
    split = [None] * len(about["shape"])
    for i, size in enumerate(about["shape"]):
      if size % 4 == 0 and "devices" not in split:
        split[i] = "devices"
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*split))
    inner = tree
    *above, last = name.split(".")
    for key in above:
      inner = inner.setdefault(key, {})
    inner[last] = jax.ShapeDtypeStruct(about["shape"], about["dtype"], sharding=place)
  found = ocp.StandardCheckpointer().restore((folder / "params").absolute(), tree)
  flat = {}
  for name, about in metadata["parameters"].items():
    array = found
    for key in name.split("."):
      array = array[key]
    assert list(array.shape) == about["shape"]
    assert str(array.dtype) == about["dtype"]
    assert len(array.sharding.device_set) == 4
    flat[name] = np.asarray(array).astype(np.float32)
  for name in [n for n in flat if n.endswith("_scale")]:
    weight = name.removesuffix("_scale")
    axes = metadata["parameters"][weight]["axes"]
    flat[weight] = multiply_out(flat[weight], flat.pop(name), axes)
  return metadata, flat


def multiply_out(codes, scale, axes):
  """Each block of 128 x 128 of the matrix [in, out] times its scale."""
  stacked = sum(axis in ("layer", "expert") for axis in axes)
  ins = 2 if axes[-1] == "dim" and axes[-3:-1] == ["head", "value"] else 1
  body = codes.shape[stacked:]
  matrix = (*codes.shape[:stacked], math.prod(body[:ins]), math.prod(body[ins:]))
  halves = 2 if axes[-1] == "gate_up" else 1
  width = matrix[-1] // halves
  column = np.arange(width) // 128
  column = np.concatenate([column + h * -(-width // 128) for h in range(halves)])
  row = np.arange(matrix[-2]) // 128
  return (codes.reshape(matrix) * scale[..., row[:, None], column]).reshape(codes.shape)


def layer_weights(c, stacked, weights, i):
  if not stacked:
    start = f"layers.{i}."
    return {n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}
  dense = i < c["n_dense_layers"]
  start = "dense_blocks." if dense else "moe_blocks."
  place = i if dense else i - c["n_dense_layers"]
  return {
    n.removeprefix(start): w[place] for n, w in weights.items() if n.startswith(start)
  }


def norm(c, x, gain):
  return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + c["norm_eps"]) * gain


def uses_yarn(c):
  return c["rope_factor"] != 1 and (
    c["yarn"] == "always" or c["max_seq_len"] > c["original_seq_len"]
  )


def frequencies(c):
  r = c["qk_rope_head_dim"]
  plain = c["rope_theta"] ** (-np.arange(0, r, 2) / r)
  if not uses_yarn(c):
    return plain

  def pair(turns):
    length = c["original_seq_len"]
    return (
      r * math.log(length / (2 * math.pi * turns)) / (2 * math.log(c["rope_theta"]))
    )

  low = max(math.floor(pair(c["beta_fast"])), 0)
  high = min(math.ceil(pair(c["beta_slow"])), r - 1)
  slow = np.clip((np.arange(r // 2) - low) / max(high - low, 1e-3), 0, 1)
  return plain * (1 - slow) + plain / c["rope_factor"] * slow


def rotate(c, x):
  """x [T, H, R]."""
  angle = np.arange(x.shape[0])[:, None, None] * frequencies(c)
  if c["rope_interleaved"]:
    a, b = x[..., ::2], x[..., 1::2]
  else:
    a, b = jnp.split(x, 2, axis=-1)
  turned = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
  if c["rope_interleaved"]:
    return jnp.stack(turned, axis=-1).reshape(x.shape)
  return jnp.concatenate(turned, axis=-1)


def attention(c, w, x):
  n, rank = c["qk_nope_head_dim"], c["kv_lora_rank"]
  if "attn.wq_a" in w:
    latent = norm(c, x @ w["attn.wq_a"], w["attn.q_norm.weight"])
    q = jnp.einsum("tq,qhk->thk", latent, w["attn.wq_b"])
  else:
    q = jnp.einsum("td,dhk->thk", x, w["attn.wq"])
  down = x @ w["attn.wkv_a"]
  latent = norm(c, down[:, :rank], w["attn.kv_norm.weight"])
  up = jnp.einsum("tc,chn->thn", latent, w["attn.wkv_b"])
  shared = rotate(c, down[:, None, rank:])
  k = jnp.concatenate(
    [up[..., :n], jnp.broadcast_to(shared, (*up.shape[:2], shared.shape[-1]))], -1
  )
  q = jnp.concatenate([q[..., :n], rotate(c, q[..., n:])], -1)
  scale = q.shape[-1] ** -0.5
  if uses_yarn(c):
    scale *= (0.1 * c["mscale"] * math.log(c["rope_factor"]) + 1) ** 2
  scores = jnp.einsum("thk,shk->hts", q, k) * scale
  scores = jnp.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -jnp.inf)
  mixed = jnp.einsum("hts,shu->thu", jax.nn.softmax(scores, -1), up[..., n:])
  return jnp.einsum("thu,hud->td", mixed, w["attn.wo"])


def swiglu(x, w13, w2):
  gate, up = jnp.split(x @ w13, 2, axis=-1)
  return (jax.nn.silu(gate) * up) @ w2


def choose(c, scores, bias):
  ranked = scores + bias
  groups = ranked.reshape(len(ranked), c["n_expert_groups"], -1)
  count = 2 if c["group_score"] == "top2_sum" else 1
  worth = jnp.sort(groups, -1)[..., -count:].sum(-1)
  least = jnp.sort(worth, -1)[:, -c["n_limited_groups"], None]
  ranked = jnp.where((worth >= least)[..., None], groups, -jnp.inf)
  return jax.lax.top_k(ranked.reshape(scores.shape), c["n_activated_experts"])[1]


def feed_forward(c, w, x):
  if "ffn.w13" in w:
    return swiglu(x, w["ffn.w13"], w["ffn.w2"])
  logits = x @ w["ffn.router.weight"]
  sigmoid = c["score_func"] == "sigmoid"
  scores = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits, -1)
  chosen = choose(c, scores, w.get("ffn.router.bias", 0.0))
  gates = jnp.take_along_axis(scores, chosen, 1)
  if c["norm_topk_prob"]:
    gates = gates / gates.sum(-1, keepdims=True)
  gates = gates * c["route_scale"]
  out = swiglu(x, w["ffn.shared.w13"], w["ffn.shared.w2"])
  for i in range(c["n_routed_experts"]):
    mine = (gates * (chosen == i)).sum(-1, keepdims=True)
    expert = w["ffn.experts.w13"][i], w["ffn.experts.w2"][i]
    out = out + mine * swiglu(x, *expert)
  return out


def logits(metadata, weights, tokens):
  c = metadata["model"]
  x = jnp.asarray(weights["embed.weight"])[tokens]
  for i in range(c["n_layers"]):
    w = layer_weights(c, metadata["stacked"], weights, i)
    x = x + attention(c, w, norm(c, x, w["attn_norm.weight"]))
    x = x + feed_forward(c, w, norm(c, x, w["ffn_norm.weight"]))
  return norm(c, x, weights["norm.weight"]) @ weights["head.weight"]


def main(folder, out, tokens):
  metadata, weights = restore(pathlib.Path(folder))
  compute = jax.jit(lambda weights, ids: logits(metadata, weights, ids))
  np.save(out, compute(weights, np.load(tokens)))


if __name__ == "__main__":
  main(*sys.argv[1:])
