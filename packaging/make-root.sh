#!/bin/sh
# Make a Debian 12 tree that boots and has a Python that makes environments: make-root.sh DIRECTORY. Needs root and
# debootstrap; a minute, 300 MB. One that is there stays as it is.
set -eu
[ ! -e "$1/sbin/init" ] || exit 0
log=$(mktemp)
debootstrap --variant=minbase --include=python3,python3-venv,systemd,systemd-sysv,dbus bookworm "$1" >"$log" 2>&1 || {
    tail "$log"
    exit 1
}
rm "$log"
