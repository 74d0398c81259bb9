#!/bin/sh
# Prints the path of a CPython >= 3.12 that can make virtual environments.
#
# Looks at $PYTHON, then PATH (every entry: a shim that refuses to run hides nothing
# behind it), pyenv, uv, asdf, mise, conda, Homebrew and python.org's installers.
# Each candidate is run, not trusted by its name. The version of `.python-version`
# wins, then any other release, then pre-releases and free-threaded builds.
# Exit code 1 and one line on standard error if there is none.

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd) || exit 1
wanted=$(head -n 1 "$root/.python-version" 2>/dev/null)

# Prints 0 (the version wanted), 1 (a release) or 2 (it would do), and the real path;
# else fails. Without uv, `ensurepip` has to bring pip into the environment.
probe='
import sys, sysconfig, importlib.util as find
import ctypes, ssl, venv, zlib
has_uv, wanted = sys.argv[1] == "1", sys.argv[2]
assert sys.version_info >= (3, 12) and sys.implementation.name == "cpython"
assert has_uv or find.find_spec("ensurepip")
version = ".".join(map(str, sys.version_info[:3]))
rank = 0 if (version + ".").startswith(wanted + ".") else 1
if sysconfig.get_config_var("Py_GIL_DISABLED"):
  rank = 2
if sys.version_info.releaselevel != "final":
  rank = 2
print(rank, sys.executable)
'
has_uv=0
command -v uv >/dev/null 2>&1 && has_uv=1
second='' third=''

consider() {
  [ -f "$1" ] && [ -x "$1" ] || return 0
  # From / so that no `.python-version` turns a pyenv shim into another Python.
  answer=$(cd / && "$1" -I -c "$probe" "$has_uv" "$wanted" 2>/dev/null </dev/null) ||
    return 0
  path=${answer#??}
  case $answer in
    0*) printf '%s\n' "$path"; exit 0 ;;
    1*) [ -n "$second" ] || second=$path ;;
    2*) [ -n "$third" ] || third=$path ;;
  esac
}

if [ -n "$PYTHON" ]; then
  path=$(command -v "$PYTHON") || path=$PYTHON
  case $path in */*) ;; *) path=/nowhere ;; esac
  consider "$path"
  [ -z "$second$third" ] || { printf '%s\n' "$second$third"; exit 0; }
  echo "PYTHON=$PYTHON is no Python >= 3.12 with venv and ensurepip: unset it or" \
    "name another" >&2
  exit 1
fi

names='python3 python3.12 python3.13 python3.14 python3.15 python3.16 python3.17'
names="$names python3.18 python3.19 python3.20 python"
for name in $names; do
  rest=$PATH:
  while [ -n "$rest" ]; do
    folder=${rest%%:*}
    rest=${rest#*:}
    case $folder in /*) consider "$folder/$name" ;; esac
  done
done
data=${XDG_DATA_HOME:-$HOME/.local/share}
for candidate in \
  "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python "$HOME"/.pyenv/versions/*/bin/python \
  "${UV_PYTHON_INSTALL_DIR:-$data/uv/python}"/*/bin/python3 \
  "${ASDF_DATA_DIR:-$HOME/.asdf}"/installs/python/*/bin/python3 \
  "${MISE_DATA_DIR:-$data/mise}"/installs/python/*/bin/python3 \
  "$HOME"/miniconda3/bin/python "$HOME"/miniforge3/bin/python \
  "$HOME"/anaconda3/bin/python /opt/conda/bin/python \
  /opt/homebrew/bin/python3.* /opt/homebrew/opt/python@3.*/bin/python3.* \
  /usr/local/bin/python3.* /usr/local/opt/python@3.*/bin/python3.* \
  /home/linuxbrew/.linuxbrew/bin/python3.* /opt/python*/bin/python3 \
  /Library/Frameworks/Python.framework/Versions/*/bin/python3 \
  /usr/bin/python3.*; do
  case $candidate in *-config) ;; *) consider "$candidate" ;; esac
done
if [ "$has_uv" = 1 ]; then
  found=$(cd / && uv python find --no-python-downloads '>=3.12' 2>/dev/null) &&
    consider "$found"
fi

found=${second:-$third}
[ -z "$found" ] || { printf '%s\n' "$found"; exit 0; }
if command -v python3 >/dev/null 2>&1; then
  seen=$(python3 --version 2>&1 | head -n 1)
else
  seen='no python3 at all'
fi
echo "No Python >= 3.12 with venv and ensurepip was found (PATH has: $seen):" \
  "install one (uv python install 3.12, pyenv install 3.12, apt install" \
  "python3.12-venv, brew install python@3.12) or name it: make PYTHON=/path/to/python" >&2
exit 1
