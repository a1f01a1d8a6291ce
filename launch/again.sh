#!/usr/bin/env bash
# Run a command, and restart it while it ends unfinished:   bash launch/again.sh .venv/bin/moe-train train configs/…yaml
#
# Purpose:  restarts a process of a job (or a job of one process) where no scheduler does so.
# Hardware: any host. With several hosts, run this on each; their processes end together and reconnect.
#
# The command is restarted after exit code 75 (stopped before the end, saved) and after a signal killed it (code above 128),
# at most RESTARTS times (default 100). Any other exit code is returned. TERM or INT stops it for good: the command receives
# TERM, on which training saves and ends.
set -uo pipefail
if [ $# = 0 ]; then echo "launch/again.sh: state the command to run" >&2; exit 2; fi

child='' stop='' noticed=''
trap 'stop=1; noticed=1; [ -z "$child" ] || kill -TERM "$child"' TERM INT
for ((restart = 0; ; restart++)); do
  "$@" &
  child=$!
  while :; do  # a signal interrupts `wait`, while the child continues
    noticed=
    wait "$child"
    code=$?
    [ -n "$noticed" ] || break
  done
  child=
  if { [ "$code" != 75 ] && [ "$code" -le 128 ]; } || [ -n "$stop" ]; then exit "$code"; fi
  if [ "$restart" -ge "${RESTARTS:-100}" ]; then
    echo "launch/again.sh: exit code $code; it was restarted $restart times, the limit (RESTARTS)" >&2
    exit "$code"
  fi
  echo "launch/again.sh: exit code $code; restarting" >&2
  sleep 1
done
