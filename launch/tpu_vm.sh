#!/usr/bin/env bash
# Cloud TPU VMs, one process per host:   bash launch/tpu_vm.sh NAME ZONE -- train configs/mixtral_8x7b_pretrain_v5p.yaml
#
# Purpose:  training on a TPU slice of Google Cloud without Kubernetes.
# Hardware: the existing slice NAME (gcloud compute tpus tpu-vm create, or a queued resource).
# Needs:    gcloud, logged in; on each host this checkout, installed, in ~/moe_train (or $CHECKOUT):
#             gcloud compute tpus tpu-vm scp --recurse . NAME:moe_train --zone ZONE --worker=all
#             gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker=all --command 'bash moe_train/launch/install.sh tpu'
#           and run_dir on a file system that all hosts share (Filestore, or a bucket mounted on each).
# Look:     gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker=0 --command 'tail -f moe_train/moe-train.log'
# Stop:     bash launch/tpu_vm.sh NAME ZONE --stop    training saves and ends
# Restarts: on each host by launch/again.sh (exit code 75; killed), which does not need this connection. A preempted
#           slice must be created again; this command then continues the run.
set -euo pipefail
checkout=${CHECKOUT:-moe_train}
case "${3:-}" in
  --stop) command="cd $(printf %q "$checkout") && kill -TERM \$(cat moe-train.pid)" ;;
  --)
    [ $# -ge 4 ] || { echo "launch/tpu_vm.sh: state a command of moe-train after --" >&2; exit 2; }
    # JAX finds the other hosts through the metadata of this one.
    command="cd $(printf %q "$checkout") && export JAX_NUM_PROCESSES=auto"
    command+=" && { nohup bash launch/again.sh .venv/bin/moe-train$(printf ' %q' "${@:4}") >> moe-train.log 2>&1 < /dev/null &"
    command+=" echo \$! > moe-train.pid; }"
    ;;
  *)
    echo "launch/tpu_vm.sh: usage: bash launch/tpu_vm.sh NAME ZONE -- train run.yaml   (or --stop)" >&2
    exit 2
    ;;
esac
exec gcloud compute tpus tpu-vm ssh "$1" --zone "$2" --worker=all --command "$command"
