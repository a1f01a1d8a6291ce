#!/usr/bin/env bash
# From nothing to a fine-tuned model in files, on this machine:   bash launch/quickstart.sh
#
# Needs python3 (3.11 or newer) and pip, and the network for the install alone; launch/install.sh has the settings.
# Works in runs/quickstart. Interrupted and started again, it continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/install.sh
# Huge pages for glibc's large blocks: on CPU a step is about a fifth faster, since fewer pages are faulted in.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec "${VENV:-.venv}/bin/moe-train" quickstart "$@"
