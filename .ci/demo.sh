#!/bin/sh
# Trains the tiny DeepSeek-V3 in $WORKDIR, or goes on where an earlier call stopped;
# the run itself ends by completing three prompts and saying where its files are.
set -eu
cd -- "$(dirname -- "$0")/.."
WORKDIR=${WORKDIR:-runs/tiny}

cat <<TEXT
Training a 2-core DeepSeek-V3 (latent attention, routed experts balanced by bias,
multi-token prediction) on the sources of Python's standard library, in $WORKDIR.
Ctrl-C stops with a checkpoint; the same command goes on from it.
TEXT
.venv/bin/python -m experiments.run --config=experiments/configs/pretrain.py:tiny \
  --workdir="$WORKDIR"
