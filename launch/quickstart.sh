#!/usr/bin/env bash
# Install moe-train and run its main workflow on this machine, up to exported files:   bash launch/quickstart.sh
#
# Needs python3 (3.11 or newer) and pip, and a network for the installation only; launch/install.sh describes the settings.
# It writes to runs/quickstart. If it is interrupted, the same command continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh
exec "${VENV:-.venv}/bin/moe-train" quickstart "$@"
