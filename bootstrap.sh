# shellcheck shell=bash
# Sourced by run_train.sh and the Makefile, which set $root: `bootstrap core` or `bootstrap dev` sets $python to an
# interpreter that has the package with its dependencies (dev: those of the tests too), making .venv where none has.

bootstrap() {
  local extra=$1 venv=$root/.venv wanted
  wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
  # An activated environment of the user's comes first; without one, a .venv that is up to date needs no look.
  local active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
  if [ -z "$active" ] || [ "$active" = "$venv" ]; then
    if _stamped "$venv" "$extra" "$wanted"; then
      python=$venv/bin/python
      return
    fi
  fi
  if _installed "$extra"; then
    python=$(command -v "${PYTHON:-python3}")
    return
  fi
  _make_venv "$venv" "$extra" "$wanted"
  python=$venv/bin/python
}

_say() { printf '[setup] %s\n' "$*" >&2; }

_stamped() { # venv extra wanted: what is installed for dev serves core too
  local name
  for name in "$2" dev; do
    [ -x "$1/bin/python" ] && [ "$(cat "$1/.installed-$name" 2>/dev/null)" = "$3" ] && return 0
  done
  return 1
}

_installed() { # extra: metadata of the package, and of everything that it requires, in the python on the path
  command -v "${PYTHON:-python3}" >/dev/null || return 1
  # -I: what is importable from the current folder is not installed.
  "${PYTHON:-python3}" -I - "$1" <<'PY'
import re, sys
from importlib.metadata import PackageNotFoundError, requires, version

try:
    for requirement in requires("torchtitan-lite") or []:
        name = re.match(r"[\w.-]+", requirement)[0]
        if "extra ==" in requirement and sys.argv[1] != "dev":
            continue
        if "python_version <" in requirement and sys.version_info >= (3, 11):
            continue
        version(name)
except PackageNotFoundError:
    sys.exit(1)
PY
}

_make_venv() { # venv extra wanted
  local venv=$1 extra=$2 wanted=$3 base=${PYTHON:-python3} target=$root quiet=()
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
    _say "error: $base is missing or older than Python 3.10; name another with PYTHON=/path/to/python3"
    exit 2
  }
  # One set-up at a time in this folder.
  if command -v flock >/dev/null; then
    exec 9>"$root/.venv.lock"
    flock 9
  fi
  if _stamped "$venv" "$extra" "$wanted"; then
    exec 9>&-
    return
  fi
  if ! "$venv/bin/python" -c '' 2>/dev/null; then
    _say "making $venv with $("$base" --version)"
    rm -rf "$venv"
    "$base" -m venv "$venv" || {
      _say "error: $base cannot make virtual environments; install its venv package (Debian: python3-venv)"
      exit 2
    }
  fi
  [ "$extra" = dev ] && target="$root[dev]"
  _say "installing $(grep -m1 '^torch==' "$root/constraints.txt") and the rest of $extra into $venv (once, some minutes)"
  [ -t 2 ] || quiet=(--quiet)
  "$venv/bin/python" -m pip install ${quiet[@]+"${quiet[@]}"} --disable-pip-version-check \
    -c "$root/constraints.txt" -e "$target" >&2 || {
    _say "error: pip failed; what it printed stands above. A second start goes on from here"
    exit 1
  }
  printf '%s\n' "$wanted" >"$venv/.installed-$extra"
  _say "ready"
  exec 9>&-
}
