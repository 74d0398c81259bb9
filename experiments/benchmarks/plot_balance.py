"""Loss and MaxVio of two runs side by side, from their metrics.jsonl.

    python -m experiments.benchmarks.plot_balance --bias runs/bias \
      --without runs/no_bias --out experiments/benchmarks/figures/h100_100m.png

The runs are `pretrain.py:h100_100m` as it stands and with
`--config.train.bias_update_rate=0.0`; see experiments/benchmarks/README.md.
"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from deepseek_jax.train.metrics import read_metrics

RUNS = (("bias", "with the bias rule", "C0"), ("without", "without", "C3"))


def smooth(values: list[float], window: int = 10) -> np.ndarray:
  """Mean of the last `window` values, fewer at the start."""
  sums = np.cumsum(np.concatenate([[0.0], values]))
  ends = np.arange(1, len(values) + 1)
  starts = np.maximum(ends - window, 0)
  return (sums[ends] - sums[starts]) / (ends - starts)


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  for name, label, _ in RUNS:
    parser.add_argument(f"--{name}", required=True, help=f"workdir {label}")
  parser.add_argument("--out", required=True)
  args = parser.parse_args()
  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
  for name, label, color in RUNS:
    records = read_metrics(getattr(args, name))
    tokens = [r["tokens"] / 1e6 for r in records]
    left.plot(
      tokens, smooth([r["loss"] for r in records]), color, label=f"loss, {label}"
    )
    left.plot(
      tokens,
      smooth([r["mtp_loss"] for r in records]),
      color,
      alpha=0.4,
      label=f"MTP loss, {label}",
    )
    right.plot(tokens, [r["max_vio"] for r in records], color, label=label)
    rate = np.median([r["tokens_per_second"] for r in records[5:]])
    mfu = np.median([r.get("mfu") or np.nan for r in records[5:]])
    half = [r["max_vio"] for r in records if r["tokens"] > tokens[-1] * 1e6 / 2]
    print(
      f"{label}: {len(records)} steps, {rate:,.0f} tokens/s, MFU {100 * mfu:.1f}%, "
      f"MaxVio over the second half {np.mean(half):.2f}"
    )
  left.set(xlabel="million tokens", ylabel="nats (mean of 10 steps)")
  right.set(xlabel="million tokens", ylabel="MaxVio, mean over layers", ylim=(0, None))
  for axis in (left, right):
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
  figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
  main()
