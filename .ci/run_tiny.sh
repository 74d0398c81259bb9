#!/bin/sh
# Runs the tiny variant of every config in experiments/configs, into a temporary
# folder. Pre-training goes first: configs that need a trained model get its workdir.
set -eu
cd -- "$(dirname -- "$0")/.."

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM

run_tiny() { # a config's name, then settings
  name=$1
  shift
  echo "-- $name:tiny"
  start=$(date +%s)
  .venv/bin/python -m experiments.run --config="experiments/configs/$name.py:tiny" \
    --workdir="$folder/$name" "$@" </dev/null
  echo "-- $name:tiny: $(($(date +%s) - start)) s"
}

run_tiny pretrain
for path in experiments/configs/*.py; do
  name=$(basename "$path" .py)
  case $name in
    __init__ | pretrain) ;;
    import) run_tiny import --config.checkpoint.path="$folder/export/exported_hf" ;;
    *) run_tiny "$name" --config.generate.checkpoint="$folder/pretrain" ;;
  esac
done
