#!/bin/sh
# Run gpu-doctor as a user that owns nothing on the node, and leave it, of the capabilities that the container was given,
# those three that only read: the rights that the systemd unit gives. Container runtimes can't do this by themselves: what
# they give to a user that is not root is lost at the first exec.
set -eu
[ "$(id -u)" = 0 ] || exec /opt/gpu-doctor/bin/gpu-doctor "$@"

permitted=0x$(sed -n 's/^CapPrm:[[:space:]]*//p' /proc/self/status)
may() { [ "$((permitted >> $1 & 1))" = 1 ]; } # BIT
kept=
keep() { ! may "$2" || kept="$kept,+$1"; } # NAME BIT
keep dac_read_search 2 # opens /proc/PID/environ, engines' logs and models
keep sys_ptrace 19     # follows /proc/PID/{root,cwd,exe,fd} of other users' processes
keep syslog 34         # reads the kernel log
if ! may 6 || ! may 7; then # CAP_SETGID, CAP_SETUID
    echo "gpu-doctor: stays root: the container was started without CAP_SETUID and CAP_SETGID, or give it --user 65532" >&2
    exec /opt/gpu-doctor/bin/gpu-doctor "$@"
fi
exec setpriv --reuid=65532 --regid=65532 --clear-groups --no-new-privs \
    --inh-caps="-all$kept" --ambient-caps="-all$kept" /opt/gpu-doctor/bin/gpu-doctor "$@"
