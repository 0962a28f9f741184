#!/usr/bin/env bash
# Try the .deb in a real, booted systemd: install, start, notify, watchdog, restart, upgrade, remove, purge.
#
#   packaging/try-in-systemd.sh OLD.deb NEW.deb [ROOT]
#
# Needs root, systemd-nspawn and debootstrap. ROOT: a Debian 12 tree with python3, systemd, systemd-sysv and dbus;
# it is copied, not changed. Without it one is made (a minute, 300 MB). Ends with 0 and `all steps passed`, or tells
# the step that failed.
set -euo pipefail
old=$1 new=$2 from=${3:-}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
if [ -n "$from" ]; then
    cp -a "$from" "$root"
else
    debootstrap --variant=minbase --include=python3,systemd,systemd-sysv,dbus bookworm "$root" >/dev/null
fi
cp "$old" "$root/old.deb"
cp "$new" "$root/new.deb"

cat >"$root/trial.sh" <<'EOF'
#!/bin/bash
set -uo pipefail
step() { echo "trial: $*"; }
fail() {
    echo "trial: FAILED: $*"
    systemctl status --no-pager --full gpu-doctor.service
    journalctl --no-pager -u gpu-doctor.service | tail -30
    exit 1
}
shown() { systemctl show --value --property="$1" gpu-doctor.service; }
await() { # SECONDS WHAT COMMAND…
    local until=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        [ $SECONDS -lt $until ] || fail "$what"
        sleep 0.2
    done
}
active() { [ "$(shown ActiveState)" = active ]; }
status_tells() { shown StatusText | grep -q "$1"; }
another_pid() { active && [ "$(shown MainPID)" != "$pid" ]; }

step "a simulated node with a lost GPU, visited each second"
mkdir -p /etc/systemd/system/gpu-doctor.service.d
cat >/etc/systemd/system/gpu-doctor.service.d/trial.conf <<'UNIT'
[Service]
ExecStart=
ExecStart=/opt/gpu-doctor/bin/gpu-doctor daemon --simulate dgx-h100-4of8 --fault gpu-lost:gpu=2 --interval 1
WatchdogSec=8
RestartSec=1
UNIT

step "install"
dpkg --install /old.deb || fail "dpkg --install"
[ -z "$(dpkg --verify gpu-doctor)" ] || fail "dpkg --verify: $(dpkg --verify gpu-doctor)"
await 90 "ready after installing" active
step "status: $(shown StatusText)"
await 10 "STATUS tells the verdict" status_tells '^critical: '

step "what the process may"
pid=$(shown MainPID)
[ "$(stat -c %U "/proc/$pid")" = gpu-doctor ] || fail "its user is $(stat -c %U "/proc/$pid")"
# bits: CAP_DAC_READ_SEARCH 2, CAP_SYS_PTRACE 19, CAP_SYSLOG 34
for set in CapBnd CapEff CapAmb; do
    grep -q "^$set:.0000000400080004$" "/proc/$pid/status" || fail "$(grep "^$set" "/proc/$pid/status")"
done
grep -q '^NoNewPrivs:.1' "/proc/$pid/status" || fail "NoNewPrivs"
[ "$(stat -c %U:%a /var/lib/gpu-doctor)" = gpu-doctor:750 ] || fail "state folder"
await 15 "a segment in the state folder" test -n "$(find /var/lib/gpu-doctor -type f)"
gpu-doctor history >/dev/null || fail "gpu-doctor history"

step "another user's process is seen through /proc"
setpriv --reuid=nobody --regid=nogroup --clear-groups sleep 600 &
other=$! # setpriv becomes the program that it starts
sleep 0.5
setpriv --reuid=gpu-doctor --regid=gpu-doctor --clear-groups cat "/proc/$other/environ" >/dev/null 2>&1 &&
    fail "without capabilities it could read, too: the trial tells nothing"
systemd-run --quiet --wait --pipe --property=User=gpu-doctor \
    --property=AmbientCapabilities="CAP_SYS_PTRACE CAP_DAC_READ_SEARCH" \
    --property=CapabilityBoundingSet="CAP_SYS_PTRACE CAP_DAC_READ_SEARCH" \
    sh -c "cat /proc/$other/environ >/dev/null && ls /proc/$other/root/ >/dev/null && readlink /proc/$other/exe >/dev/null" ||
    fail "environ, root and exe of another user's process"

step "watchdog: a stopped process is killed and started again"
kill -STOP "$pid"
await 60 "restarted by the watchdog" another_pid
journalctl --no-pager -u gpu-doctor.service | grep -q 'Watchdog timeout' || fail "the journal does not tell of the watchdog"

step "killed: it comes back"
pid=$(shown MainPID)
kill -KILL "$pid"
await 60 "restarted after a kill" another_pid

step "restart: it ends gently"
pid=$(shown MainPID)
systemctl restart gpu-doctor.service || fail "systemctl restart"
another_pid || fail "restarted"
journalctl --no-pager -u gpu-doctor.service _PID="$pid" | grep -q '"event": "ended"' || fail "it did not end gently"

step "upgrade"
pid=$(shown MainPID)
dpkg --install /new.deb || fail "dpkg --install of the new one"
await 60 "restarted by the upgrade" another_pid
[ "$(dpkg-query -W -f '${Version}' gpu-doctor)" != "$(dpkg-deb -f /old.deb Version)" ] || fail "same version"

step "an upgrade leaves a disabled, stopped service as it is"
systemctl disable --now --quiet gpu-doctor.service
dpkg --install /new.deb || fail "dpkg --install once more"
sleep 1
active && fail "it was started"

step "remove, install again, remove and purge"
systemctl enable --now --quiet gpu-doctor.service
dpkg --remove gpu-doctor || fail "dpkg --remove"
[ "$(shown ActiveState)" = inactive ] || fail "still $(shown ActiveState)"
[ -d /var/lib/gpu-doctor ] || fail "removing took the recordings"
dpkg --install /new.deb || fail "dpkg --install after removing"
await 60 "enabled as it was before it was removed" active
dpkg --remove gpu-doctor || fail "dpkg --remove again"
dpkg --purge gpu-doctor || fail "dpkg --purge"
rm -r /etc/systemd/system/gpu-doctor.service.d # the site's own, like this trial's, stays
left=$(find /opt/gpu-doctor /etc/gpu-doctor /var/lib/gpu-doctor /usr/bin/gpu-doctor /etc/systemd/system -name '*gpu-doctor*' 2>/dev/null)
[ -z "$left" ] || fail "left behind: $left"
step "all steps passed"
EOF
chmod +x "$root/trial.sh"
cat >"$root/etc/systemd/system/trial.service" <<'EOF'
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/bash -c '/trial.sh >/trial.log 2>&1; systemctl poweroff --no-block'
[Install]
WantedBy=default.target
EOF
mkdir -p "$root/etc/systemd/system/default.target.wants"
ln -sf ../trial.service "$root/etc/systemd/system/default.target.wants/trial.service"

# CAP_SYSLOG: nspawn withholds it, a node does not.
timeout 300 systemd-nspawn -q -b --capability=CAP_SYSLOG -D "$root" --register=no --keep-unit --private-network </dev/null >"$work/boot.log" 2>&1 || true
cat "$root/trial.log" 2>/dev/null || cat "$work/boot.log"
grep -q '^trial: all steps passed$' "$root/trial.log"
