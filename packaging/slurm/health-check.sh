#!/bin/sh
# Slurm's HealthCheckProgram: tells the system log when this node is not fit for work, and drains it where the site wants.
#
#   HealthCheckProgram=/usr/libexec/gpu-doctor/slurm-health-check     in slurm.conf
#   DRAIN=yes                                                         in /etc/gpu-doctor/slurm.env, to have it drained
#
# It ends with 0 whatever it finds: Slurm acts on nothing but scontrol, and some releases keep a node from registering
# until its health check returns 0. It never resumes a node: a person does, once the cause is gone.
set -u
DRAIN=no
configuration=${GPU_DOCTOR_SLURM_ENV:-/etc/gpu-doctor/slurm.env}
# shellcheck source=/dev/null
[ ! -r "$configuration" ] || . "$configuration"
node=${SLURMD_NODENAME:-$(hostname -s)}

# Slurm kills its health check after 60 s.
told=$(timeout --kill-after=5 45 "${GPU_DOCTOR:-/usr/bin/gpu-doctor}" check --format node-health 2>&1)
code=$?
reason=$(printf '%s\n' "$told" | tail -n 1)
case $code in
0) exit 0 ;;
1) priority=daemon.err what="not fit for work" ;;
124 | 137) priority=daemon.warning what="could not be judged" reason="no answer within 45 s" ;;
*) priority=daemon.warning what="could not be judged" ;;
esac
echo "gpu-doctor: $node is $what: $reason"
logger --tag gpu-doctor --priority "$priority" "$node is $what: $reason" 2>/dev/null

if [ "$code" = 1 ] && [ "$DRAIN" = yes ]; then
    # Whoever drained it first has said why; saying so again every few minutes would bury it.
    case $(scontrol --oneliner show node "$node" 2>/dev/null | tr ' ' '\n' | grep '^State=') in
    *DRAIN* | *DOWN* | *FAIL*) ;;
    *) scontrol update NodeName="$node" State=DRAIN Reason="gpu-doctor: $reason" ||
        logger --tag gpu-doctor --priority daemon.err "$node could not be drained" ;;
    esac
fi
exit 0
