"""Logits of an exported checkpoint by transformers, beside ours of the same files.

    python -m experiments.benchmarks.hf_logits FOLDER

needs torch and transformers, and FOLDER/ours.npz (`import_checkpoint.py --logits`).
Loads FOLDER in BF16 on the GPU if there is one. Prints, over positions, the smallest
cosine of the two rows of logits, and how many have the same best token: of all, and of
those whose two best logits differ by more than twice the largest difference of any
logit there. Ends with 1 if the cosine is not above 0.9999 or such a one differs.
"""

# pyright: reportMissingImports=false

import json
import sys
import time

import numpy as np
import torch
import transformers


@torch.no_grad()
def main(folder: str) -> int:
  ours = np.load(f"{folder}/ours.npz")
  device = "cuda" if torch.cuda.is_available() else "cpu"
  start = time.perf_counter()
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.bfloat16, device_map=device
  ).eval()
  seconds = time.perf_counter() - start
  theirs = model(torch.tensor(ours["ids"], device=device)).logits.double().cpu().numpy()
  a, b = ours["logits"][0].astype(np.float64), theirs[0]
  cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
  best = np.sort(b, axis=-1)
  clear = best[:, -1] - best[:, -2] > 2 * np.abs(a - b).max(-1)
  same = a.argmax(-1) == b.argmax(-1)
  found = {
    "positions": len(a),
    "min_cosine": cosine.min(),
    "mean_cosine": cosine.mean(),
    "same_best": int(same.sum()),
    "clear": int(clear.sum()),
    "same_best_of_clear": int((same & clear).sum()),
    "logit_std": b.std(),
    "max_difference": np.abs(a - b).max(),
    "load_seconds": seconds,
    "transformers": transformers.__version__,
    "torch": torch.__version__,
  }
  print(json.dumps(found))
  return int(cosine.min() <= 0.9999 or (clear & ~same).any())


if __name__ == "__main__":
  sys.exit(main(sys.argv[1]))
