#!/usr/bin/env bash
# Create a virtual environment and install this checkout into it:   bash launch/install.sh [EXTRA…]
#
# PYTHON is the interpreter (default python3; 3.11 or newer), VENV the directory of the environment (default .venv).
# pip's settings apply: a mirror (PIP_INDEX_URL), a directory of wheels (PIP_NO_INDEX=1 PIP_FIND_LINKS=wheelhouse).
# Installed parts are not installed again until pyproject.toml changes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}

if [ ! -x "$venv/bin/pip" ]; then
  python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "launch/install.sh: $python is missing or older than 3.11; state a newer one: PYTHON=python3.12 bash $0" >&2
    exit 2
  fi
  echo "creating $venv with $("$python" --version)" >&2
  "$python" -m venv "$venv"
elif [ -n "${PYTHON:-}" ] && [ "$("$PYTHON" -V)" != "$("$venv/bin/python" -V)" ]; then
  echo "launch/install.sh: $venv has $("$venv/bin/python" -V), PYTHON is $("$PYTHON" -V); remove $venv or choose another with VENV=" >&2
  exit 2
fi

state=$(cksum pyproject.toml)
missing=()
for part in package "$@"; do
  [ "$(cat "$venv/installed.$part" 2>/dev/null)" = "$state" ] || missing+=("$part")
done
[ ${#missing[@]} -gt 0 ] || exit 0

extras=$(IFS=,; echo "$*")
echo "installing moe-train${extras:+[$extras]} into $venv" >&2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
for part in package "$@"; do echo "$state" > "$venv/installed.$part"; done
