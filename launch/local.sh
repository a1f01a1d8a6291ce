#!/usr/bin/env bash
# Run N processes on this machine as one job:   bash launch/local.sh N -- train configs/…yaml [key.path=value …]
#
# Purpose:  tries on one machine what will run on several hosts; trains on its GPUs with one process per group of GPUs.
# Hardware: one host. N must divide the number of its GPUs, which are assigned in order; without GPUs, each process has
#           JAX_NUM_CPU_DEVICES CPU devices (default 1):
#             JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 bash launch/local.sh 2 -- train run.yaml mesh.fsdp=8
#
# The arguments after -- are passed to moe-train. PYTHON or VENV select the installation (default .venv).
# Restarts: launch/again.sh runs each process (exit code 75; killed). TERM or Ctrl-C saves and stops all of them.
# The first process prints to the terminal; the others print only errors, with their number.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-${VENV:-$here/../.venv}/bin/python}
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || [ "${2:-}" != -- ] || [ $# -lt 3 ]; then
  echo "launch/local.sh: usage: bash launch/local.sh N -- COMMAND…, such as bash launch/local.sh 2 -- train run.yaml" >&2
  exit 2
fi
processes=$1
shift 2

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
[ -z "${JAX_PLATFORMS:-}" ] || [[ "$JAX_PLATFORMS" == *cuda* ]] || [[ "$JAX_PLATFORMS" == *gpu* ]] || gpus=0
if [ $((gpus % processes)) != 0 ]; then
  echo "launch/local.sh: $processes processes do not divide the $gpus GPUs of this machine" >&2
  exit 2
fi
port=$((20000 + RANDOM % 10000))
while (exec 3<>"/dev/tcp/localhost/$port") 2>/dev/null; do port=$((port + 1)); done

pids=() noticed=''
trap 'noticed=1; [ ${#pids[@]} = 0 ] || kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
each=$((gpus / processes))
export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$processes
for ((i = 0; i < processes; i++)); do
  export JAX_PROCESS_ID=$i
  if [ "$each" != 0 ]; then
    JAX_LOCAL_DEVICE_IDS=$(seq -s, $((i * each)) $((i * each + each - 1)))
    export JAX_LOCAL_DEVICE_IDS
  fi
  if [ "$i" = 0 ]; then
    bash "$here/again.sh" "$python" -m moe_train "$@" &
  else
    bash "$here/again.sh" "$python" -m moe_train "$@" 2> >(sed -u "s/^/[process $i] /" >&2) &
  fi
  pids+=($!)
done

worst=0
for pid in "${pids[@]}"; do
  while :; do  # a signal interrupts `wait`
    noticed='' code=0
    wait "$pid" || code=$?
    [ -n "$noticed" ] || break
  done
  [ "$code" -le "$worst" ] || worst=$code
done
exit "$worst"
