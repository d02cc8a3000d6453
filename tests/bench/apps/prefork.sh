#!/bin/sh
# prefork.sh COUNT COMMAND...: runs a command so many times with what this has inherited, a listener for one.
# Told to stop it tells all of them, and ends with the last.
count=$1
shift
pids=
trap 'kill $pids' TERM
while [ "$count" -gt 0 ]; do
  count=$((count - 1))
  NODE_APP_INSTANCE=$count "$@" &
  pids="$pids $!"
done
# A signal ends a wait too, which is begun again while there is anyone to wait for.
while wait; [ $? -gt 128 ]; do :; done
