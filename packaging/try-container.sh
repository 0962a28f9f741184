#!/usr/bin/env bash
# Build the image and run it as docs/install.md says: the user and the rights it ends up with, /metrics, the engine of
# another container with its log, the kernel log.
#
#   packaging/try-container.sh [ROOT]
#
# Needs root, buildah, podman, runc, ip and debootstrap; no registry: the base image is made of ROOT, a tree of make-root.sh,
# made where it lacks; it is copied, not changed. Ends with 0 and `all steps passed`. A minute.
set -euo pipefail
cd "$(dirname "$0")/.."
from=${1:-}
work=$(mktemp -d)
engine='' doctor='' net=gd-trial-$$
base=localhost/gpu-doctor-trial-base image=localhost/gpu-doctor-trial
run() { # options and ulimits that podman needs where there is no systemd and no user session
    podman --log-level fatal --cgroup-manager cgroupfs --runtime runc run --ulimit nofile=1024:1024 --ulimit nproc=1024:1024 "$@"
}
clean() {
    for container in $engine $doctor; do podman rm --force --time 5 "$container" >/dev/null 2>&1 || true; done
    ip netns delete "$net" 2>/dev/null || true
    buildah rmi --force "$image" "$base" >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap clean EXIT
step() { echo "trial: $*"; }
fail() {
    echo "trial: FAILED: $*"
    [ -z "$doctor" ] || podman logs --tail 20 "$doctor"
    exit 1
}
await() { # SECONDS WHAT COMMAND…
    local until=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        [ $SECONDS -lt "$until" ] || fail "$what"
        sleep 0.2
    done
}
served() { curl --silent --fail --max-time 5 "http://127.0.0.1:$port$1"; }
metric() { served /metrics >"$work/page" && grep -qE "$1" "$work/page"; }

step "a base image without a registry"
from=${from:-$work/root}
sh packaging/make-root.sh "$from"
container=$(buildah from scratch)
mounted=$(buildah mount "$container")
tar -C "$from" --one-file-system -cf - . | tar -C "$mounted" -xf -
buildah unmount "$container" >/dev/null
buildah commit --quiet --rm "$container" "$base" >/dev/null

step "build and run"
# pip in the build trusts and asks whom this machine's pip does.
pip_options=()
if [ -n "${PIP_CERT:-}" ]; then
    pip_options=(--volume "$PIP_CERT:/etc/pip-trusts.pem:ro" --volume "$work/pip.conf:/etc/pip.conf:ro")
    printf '[global]\ncert = /etc/pip-trusts.pem\n' >"$work/pip.conf"
fi
buildah bud --quiet --isolation chroot --network host --format docker "${pip_options[@]}" --build-arg BASE="$base" \
    --file packaging/container/Containerfile --tag "$image" . >"$work/log" 2>&1 || { tail -30 "$work/log"; fail "buildah bud"; }
size() { podman image inspect --format '{{.Size}}' "$1"; }
step "the image is $((($(size "$image") - $(size "$base")) / 1000000)) MB over its base"

step "a simulated node"
run --rm --no-healthcheck --network none "$image" check --simulate hgx-h100-8 >"$work/screen" || fail "check: $(cat "$work/screen")"
head -n 3 "$work/screen"

step "without any right"
run --rm --no-healthcheck --network none --cap-drop all --user 4711 "$image" check --simulate hgx-h100-8 --for 0 >"$work/screen" 2>&1 ||
    fail "as another user: $(cat "$work/screen")"
run --rm --no-healthcheck --network none --cap-drop all "$image" check --simulate hgx-h100-8 --for 0 >"$work/screen" 2>&1 ||
    fail "as root: $(cat "$work/screen")"
grep -q "stays root" "$work/screen" || fail "it does not say that it stays root"

step "an engine in another container, with a network of its own"
ip netns add "$net"
ip link add "$net" type veth peer name engine netns "$net"
ip address add 10.213.77.1/30 dev "$net"
ip link set "$net" up
ip -n "$net" address add 10.213.77.2/30 dev engine
ip -n "$net" link set engine up
cat >"$work/vllm" <<'PY'
import http.server
print("(APIServer pid=7) INFO 11-21 07:34:01 [utils.py:233] non-default args: {'model': '/model'}", flush=True)
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'vllm:num_requests_running{model_name="/model"} 3.0\nvllm:num_requests_waiting{model_name="/model"} 0.0\n')
    def log_message(self, *_):
        pass
http.server.HTTPServer(("0.0.0.0", 8000), Page).serve_forever()
PY
mkdir "$work/model"
printf '%s' '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 512, "torch_dtype": "bfloat16"}' >"$work/model/config.json"
engine=$(run --detach --network "ns:/run/netns/$net" --user 1234 --log-driver k8s-file --volume "$work/vllm:/usr/local/bin/vllm:ro" \
    --volume "$work/model:/model:ro" --entrypoint '["/usr/bin/python3", "/usr/local/bin/vllm", "serve", "/model"]' "$base")

step "the daemon, with the host's processes and files"
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
rights="--cap-drop all --cap-add SETUID --cap-add SETGID --cap-add SYSLOG --cap-add SYS_PTRACE --cap-add DAC_READ_SEARCH \
    --security-opt no-new-privileges --security-opt apparmor=unconfined --pid host --read-only --tmpfs /tmp"
# As in docs/install.md, without what only a node with GPUs has.
# shellcheck disable=SC2086
doctor=$(run --detach --no-healthcheck $rights --network host --device /dev/kmsg --volume /:/host:ro,rslave \
    --volume gpu-doctor-trial:/var/lib/gpu-doctor "$image" \
    daemon --root /host --state-dir /var/lib/gpu-doctor --interval 1 --listen "127.0.0.1:$port")
await 60 "/metrics" metric '^gpu_doctor_build_info'
pid=$(podman inspect --format '{{.State.Pid}}' "$doctor")
[ "$(stat -c %u "/proc/$pid")" = 65532 ] || fail "its user is $(stat -c %u "/proc/$pid")"
# bits: CAP_DAC_READ_SEARCH 2, CAP_SYS_PTRACE 19, CAP_SYSLOG 34
grep -q '^CapEff:.0000000400080004$' "/proc/$pid/status" || fail "$(grep ^Cap "/proc/$pid/status")"
grep -q '^NoNewPrivs:.1' "/proc/$pid/status" || fail "NoNewPrivs"
await 30 "the engine of the other container" metric '^gpu_doctor_engine_info\{.*kind="vllm",model="/model"'
await 30 "its log" metric '^gpu_doctor_engine_log_lines_total [1-9]'
await 30 "its model" metric '^gpu_doctor_collector_success\{collector="model"\} 1'
await 30 "its metrics" metric '^gpu_doctor_engine_requests_running\{.*\} 3'
await 30 "the kernel log" metric '^gpu_doctor_collector_success\{collector="kernel-log"\} 1'
! metric '^gpu_doctor_unseen\{.*no-permission' || fail "something is closed to it: $(grep ^gpu_doctor_unseen "$work/page")"
await 30 "the recorder" metric '^gpu_doctor_recorder_failing 0'
served /healthz >/dev/null || fail "/healthz"

step "it ends gently"
podman stop --time 20 "$doctor" >/dev/null
podman logs "$doctor" 2>&1 | grep -q '"event": "ended"' || fail "it did not end gently"
podman volume rm --force gpu-doctor-trial >/dev/null 2>&1 || true

step "as in a pod: the node's folder for its recordings, no device, another network"
mkdir "$work/state"
run --rm --no-healthcheck --network none --read-only --cap-drop all --cap-add CHOWN --security-opt no-new-privileges \
    --volume "$work/state:/var/lib/gpu-doctor" --entrypoint chown "$image" 65532:65532 /var/lib/gpu-doctor
podman rm --force "$doctor" >/dev/null 2>&1
# shellcheck disable=SC2086
doctor=$(run --detach --no-healthcheck $rights --network none --volume /:/host:ro,rslave \
    --volume "$work/state:/var/lib/gpu-doctor" "$image" \
    daemon --root /host --state-dir /var/lib/gpu-doctor --interval 1 --listen 0.0.0.0:9481)
served() {
    podman exec "$doctor" python -I -c 'import sys, urllib.request as u
print(u.urlopen("http://127.0.0.1:9481" + sys.argv[1], timeout=5).read().decode())' "$1" 2>/dev/null
}
await 60 "/report, which a pod's probes ask for" eval 'served /report | grep -c "\"name\": \"$(cat /etc/hostname)\"" >/dev/null'
await 30 "the kernel log, through dmesg" metric '^gpu_doctor_collector_success\{collector="kernel-log"\} 1'
await 30 "the engine's log" metric '^gpu_doctor_engine_log_lines_total [1-9]'
await 30 "recordings in the node's folder" test -n "$(find "$work/state" -type f -user 65532)"
step "all steps passed"
