#!/usr/bin/env bash
# N processes on this machine, as one job:   bash launch/local.sh N -- train configs/…yaml [key.path=value …]
#
# Purpose:  to try on one machine what runs on several hosts; to train on its GPUs with a process for each group of them.
# Hardware: one host. N has to divide its GPUs, which are shared out in order; without any, each process has
#           JAX_NUM_CPU_DEVICES CPU devices (1 where not set):
#             JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 bash launch/local.sh 2 -- train run.yaml mesh.fsdp=8
#
# What stands after -- are moe-train's arguments. PYTHON or VENV say where it is installed (default .venv).
# Restarts: each process is run by launch/again.sh (exit code 75; killed). TERM or Ctrl-C stops and saves all of them.
# The first process has the terminal; what others say, errors alone, is marked with their number.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-${VENV:-$here/../.venv}/bin/python}
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || [ "${2:-}" != -- ] || [ $# -lt 3 ]; then
  echo "launch/local.sh: say it like this: bash launch/local.sh 2 -- train run.yaml" >&2
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
