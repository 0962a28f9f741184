#!/bin/sh
# dpkg calls it with `configure` and the version that was there, if any; rpm with how many versions there are now.
set -eu
systemd-sysusers gpu-doctor.conf
if [ "$1:${2:-}" = configure: ] || [ "$1" = 1 ]; then
    systemctl enable --quiet gpu-doctor.service # in an image that is being built, too
fi
[ -d /run/systemd/system ] || exit 0
systemctl daemon-reload
if systemctl --quiet is-enabled gpu-doctor.service; then
    # Without waiting: the first report may take its time on a sick node, and that must not fail the installation.
    systemctl restart --no-block gpu-doctor.service
fi
