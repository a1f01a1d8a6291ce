#!/usr/bin/env bash
# Install what the tests need and run them:   bash launch/test.sh [--judges] [--llama] [--slow] [pytest's arguments]
#
# --judges also installs torch, transformers and peft and runs the comparisons with them. torch should be a CPU build:
#          if pip would choose a CUDA build, add PyTorch's index of CPU wheels with PIP_EXTRA_INDEX_URL.
# --llama  (with --judges) also compares with llama.cpp: node-llama-cpp, prebuilt, and Go's templates; 90 MB into .cache/llama_cpp; needs npm.
#          LLAMA_CPP_NODE names another directory that contains it, SMOLLM2_GGUF a real model for the slow tests.
# VLLM_PYTHON (with --judges) names the interpreter of an environment with vLLM, to compare with it; see tests/judges/test_vllm.py.
# --slow   also runs the tests that take minutes.
# -n 2 --dist loadfile   runs two processes; the tests of a file share compiled programs.
# The tests run on 8 fake CPU devices. Compiled programs are kept in .cache/jax for the next run and for child processes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=(test)
arguments=()
for argument in "$@"; do
  if [ "$argument" = --judges ]; then extras+=(judges); fi
  if [ "$argument" != --llama ]; then arguments+=("$argument"); continue; fi
  export LLAMA_CPP_NODE=${LLAMA_CPP_NODE:-$PWD/.cache/llama_cpp}
  if [ ! -d "$LLAMA_CPP_NODE/node_modules/node-llama-cpp" ]; then
    npm install --prefix "$LLAMA_CPP_NODE" --omit=optional --ignore-scripts --no-audit --no-fund \
      node-llama-cpp@3.22.1 "@node-llama-cpp/linux-$(node -p process.arch)@3.22.1" @evertdespiegeleer/go-template@1.0.2
  fi
done
bash launch/install.sh "${extras[@]}"
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0}
exec "${VENV:-.venv}/bin/python" -m pytest ${arguments[@]+"${arguments[@]}"}
