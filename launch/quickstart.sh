#!/usr/bin/env bash
# From nothing to a fine-tuned model in files, on this machine:   bash launch/quickstart.sh
#
# Needs python3 (3.11 or newer) and pip, and the network for the install alone. See launch/install.sh for the settings,
# and `moe-train quickstart --help` for the options, which are passed on. Interrupted and started again, it continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh
exec "${VENV:-.venv}/bin/moe-train" quickstart "$@"
