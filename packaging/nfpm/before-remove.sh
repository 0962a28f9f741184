#!/bin/sh
# dpkg: `remove` or `upgrade`; rpm: 0 versions left, or 1. What dpkg only removes may come back, enabled as it was.
set -eu
case $1 in
remove | 0) [ ! -d /run/systemd/system ] || systemctl stop gpu-doctor.service ;;
esac
[ "$1" != 0 ] || systemctl disable --quiet gpu-doctor.service
