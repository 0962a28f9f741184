#!/bin/sh
# What was recorded goes with `dpkg --purge`, as do the configuration and the user; rpm has no such word and leaves them.
set -eu
[ ! -d /run/systemd/system ] || systemctl daemon-reload
if [ "$1" = purge ]; then
    rm -f /etc/systemd/system/multi-user.target.wants/gpu-doctor.service
    rm -rf /var/lib/gpu-doctor /etc/gpu-doctor
    # Nothing on the node is the user's any more.
    ! getent passwd gpu-doctor >/dev/null || userdel gpu-doctor
fi
