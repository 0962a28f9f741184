#!/usr/bin/env bash
# Build what is packaged and try it for real: the packages' linters, a booted systemd, rpm, an image, the manifests.
#
#   packaging/try.sh [PYTHON]
#
# PYTHON: a 3.11, as the tree has that the packages are tried in. As root it installs what it needs; what can't be tried
# here is said. Some five minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3.11}
venv=.venv/packages
say() { printf '\n== %s\n' "$*"; }

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    say "packages: not tried, which needs root on Debian or Ubuntu"
    exit 0
fi
needed=(binutils buildah curl debootstrap iproute2 lintian podman rpm rpmlint runc systemd-container)
missing=$(dpkg-query --show --showformat '${db:Status-Status} ${Package}\n' "${needed[@]}" 2>/dev/null |
    awk '$1 == "installed" { print $2 }' | grep -vxFf - <(printf '%s\n' "${needed[@]}") || true)
if [ -n "$missing" ]; then
    say "programs that try packages:" $missing
    apt-get update -qq
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=${GPU_DOCTOR_TRIAL_ROOT:-$work/root}

say "packages"
make --no-print-directory packages PYTHON="$python" VENV="$venv" DIST="$work/old"
VERSION=99.0 make --no-print-directory packages PYTHON="$python" VENV="$venv" DIST="$work/new"
lintian --allow-root --fail-on warning,error "$work"/old/*.deb
rpmlint --config packaging/nfpm/rpmlint.toml "$work"/old/*.rpm | tail -n 1
sh packaging/make-root.sh "$root"

if systemd-nspawn --quiet --register=no --keep-unit --private-network --directory "$root" true </dev/null; then
    say "the .deb in a booted systemd"
    bash packaging/try-in-systemd.sh "$work"/old/*.deb "$work"/new/*.deb "$root"
    say "the .rpm in a booted systemd"
    bash packaging/try-rpm.sh "$work"/old/*.rpm "$work"/new/*.rpm "$root"
else
    say "packages in a booted systemd: not tried, systemd-nspawn can't run here"
fi
if (unshare --mount true && buildah info) >/dev/null 2>&1; then
    say "the image"
    bash packaging/try-container.sh "$root"
else
    say "the image: not tried, buildah can't run here"
fi
say "the manifests"
PYTHON=$python bash packaging/try-kubernetes.sh
