#!/usr/bin/env bash
# Try the .rpm with the real rpm in a throw-away root, and boot that root: install, verify, upgrade, start, erase.
#
#   packaging/try-rpm.sh OLD.rpm NEW.rpm [ROOT]
#
# Needs root, rpm, systemd-nspawn and debootstrap. ROOT as for try-in-systemd.sh: a Debian tree, whose rpm database is
# empty: what the package requires is told, not asked for. Ends with 0 and `all steps passed`. 20 s.
set -euo pipefail
old=$(realpath "$1") new=$(realpath "$2") from=${3:-}
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
from=${from:-$work/from}
sh packaging/make-root.sh "$from"
cp -a "$from" "$root"
step() { echo "trial: $*"; }
fail() {
    echo "trial: FAILED: $*"
    exit 1
}
in_root() { rpm --root "$root" --dbpath /var/lib/rpm "$@"; }
boots() { # COMMAND: of a shell, in the booted root
    printf '#!/bin/sh\n%s\n' "$1" >"$root/trial.sh"
    cat >"$root/etc/systemd/system/trial.service" <<'EOF'
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'sh /trial.sh >/trial.log 2>&1; echo $? >/trial.code; systemctl poweroff --no-block'
[Install]
WantedBy=default.target
EOF
    mkdir -p "$root/etc/systemd/system/default.target.wants"
    ln -sf ../trial.service "$root/etc/systemd/system/default.target.wants/trial.service"
    rm -f "$root/trial.code"
    timeout 200 systemd-nspawn -q -b --capability=CAP_SYSLOG -D "$root" --register=no --keep-unit --private-network \
        </dev/null >"$work/boot.log" 2>&1 || true
    cat "$root/trial.log"
    [ "$(cat "$root/trial.code" 2>/dev/null)" = 0 ]
}

step "it needs: $(rpm --query --package --requires "$old" 2>/dev/null | grep -v '^rpmlib\|^/bin/sh' | paste -sd' ')"
step "install"
in_root --initdb
in_root --install --nodeps --nosignature "$old" || fail "rpm --install"
[ -z "$(in_root --verify --nodeps gpu-doctor)" ] || fail "rpm --verify: $(in_root --verify --nodeps gpu-doctor)"
chroot "$root" getent passwd gpu-doctor >/dev/null || fail "its user was not made"
[ -L "$root/etc/systemd/system/multi-user.target.wants/gpu-doctor.service" ] || fail "it is not enabled"
chroot "$root" gpu-doctor check --simulate hgx-h100-8 --for 0 >/dev/null || fail "gpu-doctor check"

step "boot"
boots 'n=0
until [ "$(systemctl show --value --property=ActiveState gpu-doctor.service)" = active ]; do
    n=$((n + 1)); [ $n -lt 120 ] || { systemctl status --no-pager gpu-doctor.service; exit 1; }; sleep 0.5
done
echo "trial: $(systemctl show --value --property=StatusText gpu-doctor.service)"
test -n "$(find /var/lib/gpu-doctor -type f)"' || fail "the service does not start"

step "upgrade: the site's configuration and the recordings stay"
echo '# the trial'"'"'s own' >>"$root/etc/gpu-doctor/config.toml"
in_root --upgrade --nodeps --nosignature "$new" || fail "rpm --upgrade"
[ "$(in_root --query gpu-doctor)" != "$(rpm --query --package "$old" 2>/dev/null)" ] || fail "same version"
grep -q "the trial's own" "$root/etc/gpu-doctor/config.toml" || fail "the configuration is gone"
[ "$(in_root --verify --nodeps gpu-doctor | grep -vc ' c /etc/gpu-doctor/')" = 0 ] || fail "$(in_root --verify --nodeps gpu-doctor)"
[ -L "$root/etc/systemd/system/multi-user.target.wants/gpu-doctor.service" ] || fail "it is not enabled any more"
[ -n "$(find "$root/var/lib/gpu-doctor" -type f)" ] || fail "the recordings are gone"

step "erase: recordings and a changed configuration stay, as rpm has it"
in_root --erase gpu-doctor || fail "rpm --erase"
[ ! -e "$root/opt/gpu-doctor" ] || fail "left behind: $(find "$root/opt/gpu-doctor" | head)"
[ ! -L "$root/etc/systemd/system/multi-user.target.wants/gpu-doctor.service" ] || fail "still enabled"
grep -q "the trial's own" "$root/etc/gpu-doctor/config.toml.rpmsave" || fail "the changed configuration is gone"
[ -n "$(find "$root/var/lib/gpu-doctor" -type f)" ] || fail "the recordings are gone"
step "all steps passed"
