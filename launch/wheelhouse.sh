#!/usr/bin/env bash
# Collect all wheels of an installation, for a machine without a network:   bash launch/wheelhouse.sh [EXTRA…]
#
# The wheels of the package, its dependencies, the extras and the build backend go to wheelhouse/ (or $WHEELHOUSE).
# Run it on the same platform and with the same Python version as the target (PYTHON=python3.12 selects the version).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
wheelhouse=${WHEELHOUSE:-wheelhouse}
extras=$(IFS=,; echo "$*")
backend=$("$python" -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"]))')
mapfile -t backend <<< "$backend"

"$python" -m pip wheel --quiet --disable-pip-version-check --wheel-dir "$wheelhouse" "${backend[@]}" ".${extras:+[$extras]}"
echo "$(find "$wheelhouse" -name '*.whl' | wc -l) wheels in $wheelhouse ($(du -sh "$wheelhouse" | cut -f1)). Run next to a copy of this checkout:"
echo "  PIP_NO_INDEX=1 PIP_FIND_LINKS=$wheelhouse bash launch/quickstart.sh      (or launch/test.sh, if test is among the extras)"
