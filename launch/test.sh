#!/usr/bin/env bash
# Install what the tests need and run them:   bash launch/test.sh [--judges] [--slow] [pytest's arguments]
#
# --judges also installs torch, transformers and peft and runs the comparisons with them. torch is wanted for CPU:
#          where pip would take a CUDA build, add PyTorch's index of CPU wheels with PIP_EXTRA_INDEX_URL.
# --slow   also runs the tests that take minutes.
# The tests run on 8 fake CPU devices. Compiled programs are kept in .cache/jax for the next run and for child processes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=(test)
for argument in "$@"; do
  if [ "$argument" = --judges ]; then extras+=(judges); fi
done
bash launch/install.sh "${extras[@]}"
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0}
exec "${VENV:-.venv}/bin/python" -m pytest "$@"
