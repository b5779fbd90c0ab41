# Sourced by the scripts beside it: the virtual environment, made on a fresh machine and refreshed when needed.
# Not a command. Needs bash, one Python >= 3.11 with venv, and a package index that pip can reach.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

runs() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# Prints a working interpreter for a name such as python3.12 (or a path). A name may be a pyenv shim that answers
# "command not found", so pyenv's own versions are tried too.
find_python() {
  local name=$1 candidate
  local candidates=("$name")
  if [[ $name =~ ^python(3\.[0-9]+)$ ]]; then
    candidates+=("${PYENV_ROOT:-$HOME/.pyenv}"/versions/"${BASH_REMATCH[1]}".*/bin/python "/usr/bin/$name" "/usr/local/bin/$name")
  fi
  for candidate in "${candidates[@]}"; do
    if runs "$candidate"; then echo "$candidate"; return; fi
  done
  return 1
}

# ensure_env EXTRA [PYTHON]: sets `venv`; makes it when missing (with PYTHON, else the oldest supported Python found),
# and installs the project with EXTRA ("base": without any) when pyproject.toml or the checkout's place changed.
ensure_env() {
  local extra=$1 request=${2:-} python="" name
  venv=.venv
  [[ -z $request ]] || venv=.venv-$(basename "$request")
  mkdir -p .cache
  exec 9>".cache/setup$venv.lock"
  if command -v flock >/dev/null; then flock 9; fi  # two scripts may start at once

  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    for name in ${request:-python3.11 python3.12 python3.13 python3.14 python3}; do
      if python=$(find_python "$name"); then break; fi
    done
    if [[ -z $python ]]; then
      say "no usable interpreter '${request:-python3.11 or later}': install Python >= 3.11 with venv and ensurepip"
      exit 2
    fi
    say "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
  fi

  local stamp="$venv/.installed-$extra" now
  now="$(cksum <pyproject.toml) $PWD"
  if [[ ! -f $stamp || $(<"$stamp") != "$now" ]]; then
    say "installing loong-jax ($extra) into $venv"
    install_project "$extra"
    echo "$now" >"$stamp"
  fi
  exec 9>&-
}

# uv takes 8 s where pip takes 40, but reads none of pip's configuration (mirrors, certificates): then pip does it.
install_project() {
  local log=".cache/install$venv.log" project=.
  [[ $1 == base ]] || project=".[$1]"
  if "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv >"$log" 2>&1 &&
    "$venv/bin/python" -m uv pip install --python "$venv/bin/python" --editable "$project" >>"$log" 2>&1; then
    return
  fi
  if ! "$venv/bin/python" -m pip install --disable-pip-version-check --editable "$project" >>"$log" 2>&1; then
    tail -n 30 "$log" >&2
    say "the installation failed; the whole log is $log"
    exit 2
  fi
}
