#!/bin/sh
# Run gpu-doctor as a user that owns nothing on the node, and leave it, of the capabilities that the container was given,
# those three that only read: the rights that the systemd unit gives. Container runtimes can't do this by themselves: what
# they give to a user that is not root is lost at the first exec.
set -eu
[ "$(id -u)" = 0 ] || exec /opt/gpu-doctor/bin/gpu-doctor "$@"

permitted=0x$(sed -n 's/^CapPrm:[[:space:]]*//p' /proc/self/status)
kept=
keep() { # NAME BIT
    [ "$((permitted >> $2 & 1))" = 0 ] || kept="$kept,+$1"
}
keep dac_read_search 2 # opens /proc/PID/environ, engines' logs and models
keep sys_ptrace 19     # follows /proc/PID/{root,cwd,exe,fd} of other users' processes
keep syslog 34         # reads the kernel log
exec setpriv --reuid=65532 --regid=65532 --clear-groups --no-new-privs \
    --inh-caps="-all$kept" --ambient-caps="-all$kept" /opt/gpu-doctor/bin/gpu-doctor "$@"
