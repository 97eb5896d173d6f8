#!/usr/bin/env bash
# End what up.sh started, and take away what it made.   down.sh DIRECTORY
set -u
here=$(realpath -m "$1")
if [ -x "$here/on" ]; then
  timeout 10 "$here/on" head scancel --user=root --signal=KILL --full 2>/dev/null
fi
[ -s "$here/prefix" ] && for name in node1 node2 head; do
  namespace=$(cat "$here/prefix")-$name
  [ -e "/run/netns/$namespace" ] || continue
  ip netns pids "$namespace" | xargs --no-run-if-empty kill -KILL 2>/dev/null
  ip netns delete "$namespace"
done
[ -s "$here/pid/munged" ] && kill "$(cat "$here/pid/munged")"
rm -rf "$here"
