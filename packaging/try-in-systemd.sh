#!/usr/bin/env bash
# Try the .deb in a real, booted systemd: install, start, notify, what it may and what it sees, watchdog, restart,
# upgrade, reboot, remove, purge.
#
#   packaging/try-in-systemd.sh OLD.deb NEW.deb [ROOT]
#
# Needs root, systemd-nspawn and debootstrap. ROOT: a tree of make-root.sh, made where it lacks; it is copied, not changed.
# Ends with 0 and `all steps passed`, or tells the step that failed. 40 s.
set -euo pipefail
old=$(realpath "$1") new=$(realpath "$2") from=${3:-}
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
from=${from:-$work/from}
sh packaging/make-root.sh "$from"
cp -a "$from" "$root"
cp "$old" "$root/old.deb"
cp "$new" "$root/new.deb"

cat >"$root/trial.sh" <<'EOF'
#!/bin/bash
set -u # and no pipefail: `grep -q` leaves the program before it with a broken pipe
step() { echo "trial: $*"; }
fail() {
    echo "trial: FAILED: $*"
    systemctl status --no-pager --full gpu-doctor.service
    journalctl --no-pager -u gpu-doctor.service | tail -30
    served /metrics | grep -E '^gpu_doctor_(collector_success|unseen|engine)'
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
another_pid() { # 0: there is none, and a kill would hit this script
    local now
    now=$(shown MainPID)
    [ "$now" != 0 ] && [ "$now" != "$pid" ] && active
}
served() { # PATH
    python3 -c 'import sys, urllib.request as u; print(u.urlopen("http://127.0.0.1:9481" + sys.argv[1], timeout=5).read().decode())' "$1" 2>/dev/null
}
metric() { served /metrics | grep -qE "$1"; }
logged() { journalctl --no-pager -u gpu-doctor.service | grep -q "$1"; }
read_kmsg() { dd if=/dev/kmsg of=/dev/null bs=8192 count=1 iflag=nonblock 2>/dev/null; } # a record a read
journal_of() { journalctl --no-pager -u gpu-doctor.service _PID="$1"; }

before_reboot() {
    step "install"
    mkdir -p /etc/systemd/system/gpu-doctor.service.d
    printf '[Service]\nWatchdogSec=8\nRestartSec=1\n' >/etc/systemd/system/gpu-doctor.service.d/trial.conf
    dpkg --install /old.deb || fail "dpkg --install"
    [ -z "$(dpkg --verify gpu-doctor)" ] || fail "dpkg --verify: $(dpkg --verify gpu-doctor)"
    await 90 "ready after installing" active
    step "a machine without GPUs: $(shown StatusText)"
    status_tells '^incomplete: ' || fail "it does not say that NVML could not be seen"

    step "the site's options, in a conffile: a simulated node with a lost GPU, visited each second"
    sed -i 's/^OPTIONS=.*/OPTIONS="--simulate dgx-h100-4of8 --fault gpu-lost:gpu=2 --interval 1"/' /etc/gpu-doctor/daemon.env
    echo 'optional = ["engine-metrics"] # the trial'"'"'s own' >>/etc/gpu-doctor/config.toml
    gpu-doctor config >/dev/null || fail "gpu-doctor config"
    systemctl restart gpu-doctor.service || fail "systemctl restart"
    await 90 "STATUS tells the verdict" status_tells '^critical: '
    metric '^gpu_doctor_finding\{.*failure_mode="gpu-lost"' || fail "/metrics does not show the lost GPU"

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
    # In the daemon's own namespace, with its own rights: nothing but its state and its /run folder can be written.
    writable=$(nsenter --target "$pid" --mount setpriv --reuid=gpu-doctor --regid=gpu-doctor --clear-groups \
        find / -xdev \( -type d -o -type f \) -writable -not -path '/proc/*' -not -path '/sys/*' -not -path '/dev/*' \
        -not -path '/var/lib/gpu-doctor*' -not -path '/run/gpu-doctor*' 2>/dev/null)
    [ -z "$writable" ] || fail "it could write: $writable"

    step "another user's engine, in a home that only that user may enter"
    useradd --create-home --shell /bin/sh serving
    install -o serving -m 600 /engine.sh /home/serving/
    chmod 700 /home/serving
    sed -i 's/^OPTIONS=.*/OPTIONS="--interval 1"/' /etc/gpu-doctor/daemon.env
    systemctl stop gpu-doctor.service
    rm -r /var/lib/gpu-doctor/* # of the node that does not exist
    systemctl start gpu-doctor.service || fail "systemctl start"
    systemd-run --quiet --unit=serving --property=User=serving sh /home/serving/engine.sh || fail "the engine does not start"
    await 60 "the engine is found, with the version in its environment and its model's name" \
        metric '^gpu_doctor_engine_info\{.*kind="vllm",model="acme/tiny".*version="0.11.0"'
    await 20 "its log is read" metric '^gpu_doctor_engine_log_lines_total [1-9]'
    await 20 "its model's config.json is read" metric '^gpu_doctor_collector_success\{collector="model"\} 1'
    ! metric '^gpu_doctor_unseen\{.*reason="no-permission".*source="(processes|engine-log|model|stack|kernel-log)"' ||
        fail "something is closed to it: $(served /metrics | grep ^gpu_doctor_unseen)"
    systemctl stop serving.service
    if [ -c /dev/kmsg ] && read_kmsg; then
        setpriv --reuid=gpu-doctor --regid=gpu-doctor --clear-groups bash -c "$(declare -f read_kmsg); read_kmsg" &&
            fail "without capabilities it could read the kernel log, too: the trial tells nothing"
        await 20 "the kernel log is read" metric '^gpu_doctor_collector_success\{collector="kernel-log"\} 1'
        step "the kernel log is read with CAP_SYSLOG"
    else
        step "there is no /dev/kmsg in this machine: not tried"
    fi

    step "root can have it let go of the GPUs, and nobody else"
    gpu-doctor release-gpu --for 1m || fail "gpu-doctor release-gpu"
    gpu-doctor retake-gpu || fail "gpu-doctor retake-gpu"
    setpriv --reuid=nobody --regid=nogroup --clear-groups gpu-doctor release-gpu 2>/dev/null && fail "anybody could"

    step "watchdog: a stopped process is killed and started again"
    pid=$(shown MainPID)
    kill -STOP "$pid"
    await 60 "restarted by the watchdog" another_pid
    logged 'Watchdog timeout' || fail "the journal does not tell of the watchdog"

    step "killed: it comes back, and goes on where its recording ends"
    pid=$(shown MainPID)
    kill -KILL "$pid"
    await 60 "restarted after a kill" another_pid
    await 20 "the recording is read back" eval 'journal_of "$(shown MainPID)" | grep -q "\"event\": \"recording read\""'

    step "restart: it ends gently"
    pid=$(shown MainPID)
    systemctl restart gpu-doctor.service || fail "systemctl restart"
    another_pid || fail "restarted"
    journal_of "$pid" | grep -q '"event": "ended"' || fail "it did not end gently"

    step "upgrade: the site's configuration and the recordings stay, the service is restarted"
    pid=$(shown MainPID)
    segments=$(find /var/lib/gpu-doctor -type f | sort | head -1)
    dpkg --install /new.deb </dev/null || fail "dpkg --install of the new one"
    await 60 "restarted by the upgrade" another_pid
    [ "$(dpkg-query -W -f '${Version}' gpu-doctor)" != "$(dpkg-deb -f /old.deb Version)" ] || fail "same version"
    grep -q '^OPTIONS="--interval 1"' /etc/gpu-doctor/daemon.env || fail "the options are gone"
    grep -q "the trial's own" /etc/gpu-doctor/config.toml || fail "the configuration is gone"
    [ -e "$segments" ] || fail "the recordings are gone"
    await 20 "the recording is read back" eval 'journal_of "$(shown MainPID)" | grep -q "\"event\": \"recording read\""'

    step "an upgrade leaves a disabled, stopped service as it is"
    systemctl disable --now --quiet gpu-doctor.service
    dpkg --install /new.deb </dev/null || fail "dpkg --install once more"
    sleep 1
    active && fail "it was started"
    systemctl enable --quiet gpu-doctor.service
}

after_reboot() {
    step "rebooted: it starts by itself"
    await 90 "started at boot" active
    await 20 "the recording is read back" eval 'journal_of "$(shown MainPID)" | grep -q "\"event\": \"recording read\""'

    step "remove: configuration and recordings stay; installed again, it goes on"
    dpkg --remove gpu-doctor || fail "dpkg --remove"
    [ "$(shown ActiveState)" = inactive ] || fail "still $(shown ActiveState)"
    [ -n "$(find /var/lib/gpu-doctor -type f)" ] || fail "removing took the recordings"
    grep -q "the trial's own" /etc/gpu-doctor/config.toml || fail "removing took the configuration"
    [ ! -e /opt/gpu-doctor ] || fail "left behind: $(find /opt/gpu-doctor | head)"
    dpkg --install /new.deb </dev/null || fail "dpkg --install after removing"
    await 60 "enabled as it was before it was removed" active

    step "purge: nothing is left, its user neither"
    dpkg --purge gpu-doctor || fail "dpkg --purge"
    rm -r /etc/systemd/system/gpu-doctor.service.d # the site's own, like this trial's, stays
    systemctl daemon-reload
    left=$(find / -xdev \( -path /proc -o -path /sys \) -prune -o -name '*gpu-doctor*' -print | grep -v -e '^/tmp/' -e '^/var/log/journal/')
    [ -z "$left" ] || fail "left behind: $left"
    ! getent passwd gpu-doctor && ! getent group gpu-doctor || fail "its user is left behind"
    systemctl --failed --quiet --no-legend | grep -q gpu-doctor && fail "systemd remembers it as failed"
    step "all steps passed"
}

if [ ! -e /rebooted ]; then
    before_reboot
    touch /rebooted
else
    after_reboot
fi
EOF
cat >"$root/engine.sh" <<'EOF'
# A process that is called as a vLLM is, with an environment, a log and a model in its user's home.
cd /home/serving
umask 077
mkdir -p venv/bin venv/lib/python3.11/site-packages/vllm-0.11.0.dist-info .cache/huggingface/hub/models--acme--tiny/snapshots/1
ln -sf /usr/bin/python3 venv/bin/python
printf '%s' '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 512, "torch_dtype": "bfloat16"}' >.cache/huggingface/hub/models--acme--tiny/snapshots/1/config.json
cat >venv/bin/vllm <<'PY'
import time
print("(APIServer pid=7) INFO 11-21 07:34:01 [utils.py:233] non-default args: {'model': 'acme/tiny'}", flush=True)
time.sleep(3600)
PY
exec /home/serving/venv/bin/python venv/bin/vllm serve acme/tiny >>serving.log 2>&1
EOF
chmod +x "$root/trial.sh"
cat >"$root/etc/systemd/system/trial.service" <<'EOF'
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/bin/bash -c '/trial.sh >>/trial.log 2>&1; systemctl poweroff --no-block'
[Install]
WantedBy=default.target
EOF
mkdir -p "$root/etc/systemd/system/default.target.wants" "$root/var/log/journal"
ln -sf ../trial.service "$root/etc/systemd/system/default.target.wants/trial.service"

# CAP_SYSLOG and /dev/kmsg: nspawn withholds them, a node does not.
kmsg=$([ ! -c /dev/kmsg ] || echo --bind-ro=/dev/kmsg)
boot() {
    timeout 600 systemd-nspawn -q -b --capability=CAP_SYSLOG ${kmsg:+"$kmsg"} -D "$root" --register=no --keep-unit \
        --private-network </dev/null >"$work/boot.log" 2>&1 || true
}
boot
[ ! -e "$root/rebooted" ] || boot
cat "$root/trial.log" 2>/dev/null || cat "$work/boot.log"
grep -q '^trial: all steps passed$' "$root/trial.log"
