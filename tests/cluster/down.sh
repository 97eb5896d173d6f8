#!/usr/bin/env bash
# End what up.sh started, and take away what it made.   down.sh DIRECTORY
set -u
here=$(realpath -m "$1")
if [ -x "$here/on" ]; then
  timeout 10 "$here/on" head scancel --user=root --signal=KILL --full 2>/dev/null
fi
for name in node1 node2 head; do
  [ -e "/run/netns/pt-$name" ] || continue
  ip netns pids "pt-$name" | xargs --no-run-if-empty kill -KILL 2>/dev/null
  ip netns delete "pt-$name"
done
[ -s "$here/pid/munged" ] && kill "$(cat "$here/pid/munged")"
rm -rf "$here"
