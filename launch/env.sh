# Sourced by the other scripts: makes or reuses a virtual environment and leaves $PYTHON in it.
#   prepare_env FOLDER EXTRAS [PIP ARGUMENTS...]
# The best interpreter is taken: jax >= 0.11, several times faster on CPU, needs Python 3.12 or newer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

works() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  local name candidate
  for name in ${ALIGNMENT_JAX_PYTHONS:-python3.13 python3.12 python3.11 python3}; do
    # a version manager's shim can exist and still fail when it is run, so every candidate is run
    for candidate in "$(command -v "$name" || true)" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/"$name"; do
      if [ -x "$candidate" ] && works "$candidate"; then echo "$candidate"; return 0; fi
    done
  done
  echo "No Python >= 3.11 with venv was found. Install python3.12 (Debian: apt-get install python3.12-venv) and try again." >&2
  return 1
}

prepare_env() {
  local folder=$1 extras=$2; shift 2
  local wanted; wanted=$(cat setup.py pyproject.toml | cksum; echo "$extras" "$@")
  PYTHON=$PWD/$folder/bin/python
  if [ "$(cat "$folder/.installed" 2>/dev/null)" != "$wanted" ] || ! "$PYTHON" -c '' 2>/dev/null; then
    local found; found=$(find_python)
    echo "environment     $folder with $("$found" --version) ($found)"
    case $("$found" -c 'import sys; print(sys.version_info[1])') in
      11) echo "                Python 3.11 brings an older jax, several times slower on CPU; 3.12 or newer is better" ;;
    esac
    [ -x "$PYTHON" ] && "$PYTHON" -m pip --version >/dev/null 2>&1 || { rm -rf "$folder"; "$found" -m venv "$folder"; }
    echo "installing      the package and what it needs (a minute or two, about 1.5 GB)"
    local began=$SECONDS
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-warn-script-location "$@" -e ".[$extras]"
    printf '%s\n' "$wanted" > "$folder/.installed"
    echo "installed       in $((SECONDS - began)) s"
  else
    echo "environment     $folder, as it was"
  fi
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/$folder/jax_cache}
}
