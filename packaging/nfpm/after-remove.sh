#!/bin/sh
# What was recorded goes with `dpkg --purge`, as does the configuration; rpm has no such word and leaves them.
set -eu
[ ! -d /run/systemd/system ] || systemctl daemon-reload
if [ "$1" = purge ]; then
    rm -f /etc/systemd/system/multi-user.target.wants/gpu-doctor.service
    rm -rf /var/lib/gpu-doctor /etc/gpu-doctor
fi
