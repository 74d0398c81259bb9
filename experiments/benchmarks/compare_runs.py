"""Loss curves of runs against a base, step by step, from their metrics.jsonl.

    python -m experiments.benchmarks.compare_runs --base runs/bf16 --others runs/fp8 \
      [--skip WARMUP] [--window 50] [--bound 0.0025] [--mtp] [--biases] \
      [--out curves.png]

Several bases, such as runs that differ only in roundings, count as one with their mean
loss at each step; each of them is then compared with that mean as well, which shows
how far roundings alone take runs apart.

Runs that are still under way are compared as far as all have come. Both losses are
smoothed by the mean of the last `--window` steps, then divided; a window counts when
it lies wholly after the warm-up, so the first value is that of step skip + window.
Single steps are compared after the warm-up too.

`--mtp` compares the loss of multi-token prediction instead of the model's own.

`--biases` reads the router biases of the newest checkpoints, which must be of one
step. Left out: whether each update was the same, as only their sums are kept.
"""

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from deepseek_jax.io import workdir
from deepseek_jax.io.checkpoint import restore_newest
from deepseek_jax.mesh import make_mesh
from deepseek_jax.train.metrics import read_metrics
from deepseek_jax.train.step import abstract_state

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Comparison:
  """Another run's loss over the base's, less 1, after the warm-up.

  Attributes:
    steps: the steps that both have a finite loss of, warm-up left out.
    single: the relative difference of each of them.
    smooth_steps: the last step of each window.
    smoothed: the relative difference of the two means over each window.
    first_apart: the first step of all, warm-up included, whose losses are not the
      same number; None if there is none.
  """

  steps: np.ndarray
  single: np.ndarray
  smooth_steps: np.ndarray
  smoothed: np.ndarray
  first_apart: int | None

  def holds(self, bound: float) -> bool:
    """Whether every smoothed difference is below the bound."""
    return bool(np.abs(self.smoothed).max() < bound)


def losses(records: Records) -> dict[int, float]:
  """Loss by step, without steps whose loss was not finite."""
  return {r["step"]: r["loss"] for r in records if r["loss"] is not None}


def mtp_only(label: str, records: Records) -> Records:
  """The records with the loss of multi-token prediction in the place of the model's."""
  if not any(r.get("mtp_loss") for r in records):
    raise SystemExit(f"error: {label} has no loss of MTP: leave out --mtp")
  return [
    {
      **r,
      "loss": None if r["loss"] is None else r["mtp_loss"],
      "validation_loss": r.get("validation_mtp_loss"),
    }
    for r in records
  ]


def mean_of(runs: list[Records]) -> Records:
  """One run of mean losses, of the steps that all have finite losses of."""
  by_step = [{r["step"]: r for r in run if r["loss"] is not None} for run in runs]
  found = []
  for step in sorted(set.intersection(*map(set, by_step))):
    same = [run[step] for run in by_step]
    record = {"step": step, "learning_rate": same[0]["learning_rate"]}
    record["loss"] = statistics.fmean(r["loss"] for r in same)
    if all(r.get("validation_loss") for r in same):
      record["validation_loss"] = statistics.fmean(r["validation_loss"] for r in same)
    found.append(record)
  return found


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
  """Means of `window` neighbours: [n] to [n - window + 1]."""
  sums = np.cumsum(np.concatenate([[0.0], values]))
  return (sums[window:] - sums[:-window]) / window


def warm_up_end(records: Records) -> int:
  """The first step at the largest learning rate; 0 for no records."""
  rates = [r["learning_rate"] for r in records]
  return records[int(np.argmax(rates))]["step"] if records else 0


def compare(base: Records, other: Records, skip: int, window: int) -> Comparison:
  """Matches two runs by step.

  Args:
    skip: the last step of the warm-up.
    window: steps whose losses are averaged.

  Raises:
    ValueError: fewer common steps after the warm-up than one window.
  """
  mine, theirs = losses(base), losses(other)
  common = np.array(sorted(mine.keys() & theirs.keys()), int)
  apart = [int(s) for s in common if mine[s] != theirs[s]]
  steps = common[common > skip]
  if len(steps) < window:
    raise ValueError(
      f"{len(steps)} common steps after step {skip} are fewer than --window={window}: "
      "lower --skip or --window, or wait"
    )
  mine_S, theirs_S = (np.array([run[s] for s in steps]) for run in (mine, theirs))
  return Comparison(
    steps,
    theirs_S / mine_S - 1,
    steps[window - 1 :],
    moving_mean(theirs_S, window) / moving_mean(mine_S, window) - 1,
    apart[0] if apart else None,
  )


def describe(label: str, found: Comparison, window: int, bound: float) -> str:
  """The comparison in a few lines."""
  worst, peak = np.abs(found.single).argmax(), np.abs(found.smoothed).argmax()
  first = found.first_apart
  lines = (
    f"{label}: {len(found.steps)} steps compared, {found.steps[0]} to "
    f"{found.steps[-1]}; "
    + ("all losses the same" if first is None else f"first apart at step {first}"),
    f"  mean of {window} steps: {100 * found.smoothed.mean():+.4f}% on average, "
    f"{100 * np.abs(found.smoothed).mean():.4f}% in magnitude, largest "
    f"{100 * found.smoothed[peak]:+.4f}% at step {found.smooth_steps[peak]}",
    f"  single steps: largest {100 * found.single[worst]:+.4f}% at step "
    f"{found.steps[worst]}",
    f"  bound of {100 * bound:g}%: {'holds' if found.holds(bound) else 'FAILS'}",
  )
  return "\n".join(lines)


def summarise(label: str, records: Records, base: Records) -> str:
  """Length, speed and validation of one run, the latter against the base's."""
  rate = np.median([r["tokens_per_second"] for r in records[5:] or records])
  missing = sum(not r["applied"] for r in records)
  line = f"{label}: {len(records)} steps, {rate:,.0f} tokens/s (median)"
  line += f", {missing} steps not applied" if missing else ""
  measured = {r["step"]: r["validation_loss"] for r in base if r.get("validation_loss")}
  for r in records:
    if value := r.get("validation_loss"):
      line += f"; validation at step {r['step']}: {value:.4f}"
      if records is not base and r["step"] in measured:
        line += f" ({100 * (value / measured[r['step']] - 1):+.3f}%)"
  return line


def read_biases(folder: Path) -> tuple[int, np.ndarray, float]:
  """The newest checkpoint's step, its router biases [layers, experts], their rate.

  Raises:
    ValueError, FileNotFoundError: no checkpoint, or a model without such biases.
  """
  config = workdir.read(folder)
  mesh = make_mesh(devices=jax.devices()[:1])
  abstract = abstract_state(config, mesh).bias
  if not abstract:
    raise ValueError(f"{folder}: the model has no router biases, leave out --biases")
  found = restore_newest(folder / "checkpoints", {"bias": abstract})
  if found is None:
    raise FileNotFoundError(f"{folder} has no checkpoint: let the run end first")
  biases = [np.atleast_2d(np.asarray(b)) for b in found.state["bias"].values()]
  return found.step, np.concatenate(biases), config.train.bias_update_rate


def compare_biases(base: Path, other: Path) -> str:
  """How many biases are the same, and how many updates apart the others are."""
  (step, mine_LE, rate), (their_step, theirs_LE, _) = map(read_biases, (base, other))
  if step != their_step:
    raise ValueError(
      f"checkpoints of steps {step} ({base}) and {their_step} ({other}) cannot be "
      "compared: train both equally long"
    )
  apart_LE = np.abs(mine_LE - theirs_LE) / rate if rate else mine_LE - theirs_LE
  return (
    f"  router biases after step {step}, {mine_LE.shape[0]} layers x "
    f"{mine_LE.shape[1]}: {(mine_LE == theirs_LE).sum()} of {mine_LE.size} bit for "
    f"bit, {(apart_LE < 0.5).sum()} to less than half an update; largest difference "
    f"{apart_LE.max():.2f} updates of {rate:g}, mean {apart_LE.mean():.2f}"
  )


def draw(
  runs: dict[str, Records],
  found: dict[str, Comparison],
  base: str,
  window: int,
  bound: float,
  kind: str,
  path: Path,
) -> None:
  """Smoothed losses, and below them the relative differences to the base."""
  figure, (above, below) = plt.subplots(
    2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 2), layout="constrained"
  )
  for colour, (label, records) in enumerate(runs.items()):
    by_step = losses(records)
    steps, values = np.array(list(by_step)), np.array(list(by_step.values()))
    style = {"color": f"C{colour}", "label": label, "linewidth": 1}
    above.plot(steps[window - 1 :], moving_mean(values, window), **style)
    if label in found:
      smoothed = found[label].smoothed
      below.plot(found[label].smooth_steps, 100 * smoothed, **style)
  for limit in (-bound, bound):
    below.axhline(100 * limit, color="black", linestyle=":", linewidth=1)
  above.set(ylabel=f"{kind}, nats (mean of {window} steps)")
  below.set(xlabel="step", ylabel=f"% above {base}")
  for axis in (above, below):
    axis.grid(alpha=0.3)
  above.legend(fontsize=8)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)


def parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--base", required=True, type=Path, nargs="+", help="workdirs")
  parser.add_argument("--others", required=True, type=Path, nargs="+", help="workdirs")
  parser.add_argument(
    "--skip", type=int, help="steps of the warm-up; default: the base's, by its rate"
  )
  parser.add_argument("--window", type=int, default=50, help="steps to average")
  parser.add_argument("--bound", type=float, default=0.0025, help="of the difference")
  parser.add_argument("--mtp", action="store_true", help="its loss, not the model's")
  parser.add_argument("--biases", action="store_true", help="compare router biases")
  parser.add_argument("--out", type=Path, help="a PNG of the curves")
  return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
  args = parse(arguments)
  if args.biases:
    jax.config.update("jax_platforms", "cpu")
  if args.biases and len(args.base) > 1:
    raise SystemExit("error: --biases compares with one run, give one --base")
  folders = [*args.base, *args.others]
  runs = {f.name: read_metrics(f) for f in folders}
  if len(runs) < len(folders):
    raise SystemExit("error: two workdirs have one name, which labels their curves")
  for label, records in runs.items():
    if not records:
      raise SystemExit(f"error: {label} has no metrics.jsonl yet")
  if args.mtp:
    runs = {label: mtp_only(label, records) for label, records in runs.items()}
  name, base, others = args.base[0].name, runs[args.base[0].name], args.others
  if len(args.base) > 1:
    name = "the mean of " + " and ".join(f.name for f in args.base)
    base, others = mean_of([runs[f.name] for f in args.base]), folders
  skip = args.skip
  if skip is None:
    skip = warm_up_end(base)
  for label, records in runs.items():
    print(summarise(label, records, base))
  kind = "loss of MTP" if args.mtp else "loss"
  print(f"{kind} against {name}, after step {skip}:")
  found = {}
  for other in others:
    found[other.name] = compare(base, runs[other.name], skip, args.window)
    print(describe(other.name, found[other.name], args.window, args.bound))
    if args.biases:
      print(compare_biases(args.base[0], other))
  if args.out:
    label = name if len(args.base) == 1 else "the bases' mean"
    draw(runs, found, label, args.window, args.bound, kind, args.out)
    print(f"figure: {args.out}")


if __name__ == "__main__":
  main()
