#!/usr/bin/env bash
# A real Slurm of one controller and two nodes on this machine, for tests; it needs root.   up.sh DIRECTORY
#
#   DIRECTORY/on head|node1|node2 COMMAND...   runs a command there; `on head sbatch ...` submits
#   DIRECTORY/slurmd node1|node2               starts the daemon of a node, also again after its processes were killed
#
# A node is a network namespace with a host name of its own; all share the files of this machine, as nodes share a network disk.
# Namespaces have a name that nobody else has, so clusters may stand side by side, and one that was left behind is in nobody's way.
# What is missing is installed from Debian's packages. Nothing is written to beyond DIRECTORY, and down.sh takes all away.
set -euo pipefail
here=$(realpath -m "$1")
for program in slurmctld slurmd sbatch munged ip sshd; do
  command -v "$program" >/dev/null && continue
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -qq --yes --no-install-recommends slurmctld slurmd slurm-client munge iproute2 openssh-server openssh-client >/dev/null
  break
done

cores=$(($(nproc) > 2 ? $(nproc) : 2))
declare -A address=([head]=10.91.7.1 [node1]=10.91.7.11 [node2]=10.91.7.12)
mkdir -p "$here"/{state,log,pid,spool.node1,spool.node2}
prefix=pt-$(od -A n -N 4 -t x4 /dev/urandom | tr -d ' ')
echo "$prefix" > "$here/prefix"

# Who they are to one another: a key that lives as long as the cluster.
install -d -m 700 "$here/munge"
(umask 077 && dd if=/dev/urandom of="$here/munge/key" bs=128 count=1 status=none)
install -d -m 755 "$here/socket"
munged --force --key-file="$here/munge/key" --seed-file="$here/munge/seed" --socket="$here/socket/munge" \
  --log-file="$here/munge/log" --pid-file="$here/pid/munged"

# cred_expire: a requeued job starts again once its credential has run out; below 5 seconds it is taken for two minutes, and a slow
# machine has to start ranks within it. GraceTime: what a preempted job has to save.
cat > "$here/slurm.conf" <<CONF
ClusterName=posttrain
SlurmctldHost=head(${address[head]})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$here/socket/munge,cred_expire=10
CredType=cred/munge
StateSaveLocation=$here/state
SlurmdSpoolDir=$here/spool.%n
SlurmctldPidFile=$here/pid/slurmctld
SlurmdPidFile=$here/pid/slurmd.%n
SlurmctldLogFile=$here/log/slurmctld
SlurmdLogFile=$here/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PropagateResourceLimits=NONE
ReturnToService=2
SlurmdTimeout=20
KillWait=10
MinJobAge=300
NodeName=node1 NodeAddr=${address[node1]} CPUs=$cores RealMemory=4000
NodeName=node2 NodeAddr=${address[node2]} CPUs=$cores RealMemory=4000
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=60 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node1,node2 MaxTime=60 PriorityTier=2
CONF

# Who is where: nobody asks a name server.
printf 'hosts: files\npasswd: files\ngroup: files\n' > "$here/nsswitch.conf"
{ echo "127.0.0.1 localhost"; for name in "${!address[@]}"; do echo "${address[$name]} $name"; done; } > "$here/hosts"

# One bridge in the namespace of the controller, and a cable from it to each node.
for name in head node1 node2; do
  ip netns add "$prefix-$name"
  ip -n "$prefix-$name" link set lo up
done
ip -n "$prefix-head" link add hub type bridge
ip -n "$prefix-head" address add "${address[head]}/24" dev hub
ip -n "$prefix-head" link set hub up
for name in node1 node2; do
  ip -n "$prefix-head" link add "to-$name" type veth peer name eth0 netns "$prefix-$name"
  ip -n "$prefix-head" link set "to-$name" master hub up
  ip -n "$prefix-$name" address add "${address[$name]}/24" dev eth0
  ip -n "$prefix-$name" link set eth0 up
done

cat > "$here/on" <<'ON'
#!/bin/sh
# Not `ip netns exec`: it hides the control groups that slurmd looks for.
export PT_NAME="$1" PT_HERE="$(dirname "$0")"
shift
export SLURM_CONF="$PT_HERE/slurm.conf"
exec nsenter --net="/run/netns/$(cat "$PT_HERE/prefix")-$PT_NAME" unshare --uts --mount sh -c '
hostname "$PT_NAME"
for file in hosts nsswitch.conf; do mount --bind "$PT_HERE/$file" "/etc/$file"; done
exec "$@"' sh "$@"
ON
cat > "$here/slurmd" <<'SLURMD'
#!/bin/sh
exec "$(dirname "$0")/on" "$1" slurmd -N "$1"
SLURMD
chmod +x "$here/on" "$here/slurmd"

"$here/on" head slurmctld
"$here/slurmd" node1
"$here/slurmd" node2
for _ in $(seq 900); do
  [ "$("$here/on" head sinfo --noheader --Node --partition=main --states=idle 2>/dev/null | wc -l)" = 2 ] && exit 0
  sleep 0.1
done
echo "the nodes did not come up:" >&2
tail -n 20 "$here"/log/* >&2
exit 1
