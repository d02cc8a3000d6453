#!/bin/sh
# prefork.sh COUNT COMMAND...: runs COUNT copies of a command, which inherit its fds. SIGTERM is passed on to all, and it
# ends with the last.
count=$1
shift
pids=
trap 'kill $pids' TERM
while [ "$count" -gt 0 ]; do
  count=$((count - 1))
  NODE_APP_INSTANCE=$count "$@" &
  pids="$pids $!"
done
# A signal ends a wait, too. Then wait again while there are processes.
while wait; [ $? -gt 128 ]; do :; done
