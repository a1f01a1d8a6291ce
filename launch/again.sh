#!/usr/bin/env bash
# Run a command, and run it again where it ends unfinished:   bash launch/again.sh .venv/bin/moe-train train configs/…yaml
#
# Purpose:  one process of a job (or a job of one) that survives the night where nothing else looks after it.
# Hardware: any host. Of several hosts each runs this; their processes end together and meet again.
#
# It is run again after exit code 75 (stopped before the end, saved) and where a signal killed it (its code is above 128),
# at most RESTARTS times (default 100). Any other code is handed on. TERM or INT stops it for good: the command is sent TERM,
# with which training saves and ends.
set -uo pipefail
if [ $# = 0 ]; then echo "launch/again.sh: name the command that is to be run" >&2; exit 2; fi

child='' stop='' noticed=''
trap 'stop=1; noticed=1; [ -z "$child" ] || kill -TERM "$child"' TERM INT
for ((restart = 0; ; restart++)); do
  "$@" &
  child=$!
  while :; do  # a signal interrupts `wait`, and the child goes on
    noticed=
    wait "$child"
    code=$?
    [ -n "$noticed" ] || break
  done
  child=
  if { [ "$code" != 75 ] && [ "$code" -le 128 ]; } || [ -n "$stop" ]; then exit "$code"; fi
  if [ "$restart" -ge "${RESTARTS:-100}" ]; then
    echo "launch/again.sh: exit code $code; it was started again $restart times, which is enough (RESTARTS)" >&2
    exit "$code"
  fi
  echo "launch/again.sh: exit code $code; starting again" >&2
  sleep 1
done
