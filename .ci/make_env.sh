#!/bin/sh
# Makes .venv and installs this package into it, editable, with the extras named in
# $EXTRAS (default: those of the last time, at first "dev").
#
# Does nothing when pyproject.toml, the extras and the folder are those of the last
# install. An install that was interrupted, an environment whose Python is gone and a
# moved repository are begun anew. An environment made by hand is kept and completed.
set -eu
cd -- "$(dirname -- "$0")/.."

python=.venv/bin/python
stamp=.venv/installed # folder, extras, then pyproject.toml, of the last install
marker=.venv/installing # stands while an install is under way
log=.venv/install.log

[ -n "${EXTRAS:-}" ] || EXTRAS=$(sed -n 2p "$stamp" 2>/dev/null || true)
EXTRAS=${EXTRAS:-dev}
wanted() { pwd -P; echo "$EXTRAS"; cat pyproject.toml; }
runs() { "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

if [ ! -e "$marker" ] && wanted | cmp -s - "$stamp" && runs; then
  exit 0
fi

if [ -e .venv ] || [ -L .venv ]; then
  if [ -e "$marker" ] || ! runs ||
    { [ -e "$stamp" ] && [ "$(head -n 1 "$stamp")" != "$(pwd -P)" ]; }; then
    echo 'Removing .venv: it is incomplete, moved or too old'
    rm -rf .venv.old # renamed first: half a removed environment could look whole
    mv .venv .venv.old
  fi
fi
rm -rf .venv.old
uv=$(command -v uv || true)
if [ ! -e .venv ]; then
  base=$(sh .ci/find_python.sh)
  echo "Making .venv with $base"
  mkdir .venv
  : >"$marker"
  if [ -n "$uv" ]; then
    # --allow-existing: .venv holds the marker already.
    "$uv" venv --quiet --allow-existing --python "$base" .venv
  else
    "$base" -m venv .venv
  fi
fi

: >"$marker"
rm -f "$stamp"
echo "Installing deepseek_jax[$EXTRAS] into .venv (2 GB when new; log: $log)"
install() {
  if [ -n "$uv" ]; then
    "$uv" pip install --python "$python" -e ".[$EXTRAS]"
  else
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip
    "$python" -m pip install --disable-pip-version-check --progress-bar off \
      -e ".[$EXTRAS]"
  fi
}
if ! install >"$log" 2>&1; then
  tail -n 25 "$log" >&2
  echo "The install failed (above: the end of $log): mend that, then run make again" >&2
  exit 1
fi
wanted >"$stamp"
rm -f "$marker"
