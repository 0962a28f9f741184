#!/bin/sh
# Build the .deb and the .rpm: build.sh PYTHON OUT. Needs pip's index and nfpm; neither package needs anything at install.
# The program lives in its own environment, /opt/gpu-doctor, made here as it will lie there: PYTHON's version is that
# of the node's interpreter (3.11: Debian 12, python3.11 of RHEL 9), since its wheels are compiled for one version.
set -eu
python=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
here=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
home=$work/opt/gpu-doctor

pip() { "$python" -m pip --quiet --disable-pip-version-check "$@"; }
pip wheel --no-deps --wheel-dir "$work/wheel" "$here"
set -- "$work"/wheel/*.whl
pip install --no-compile --only-binary=:all: --target "$home/lib/python$minor/site-packages" "$1[web]"
rm -rf "$home/lib/python$minor/site-packages/bin"

mkdir -p "$home/bin"
ln -s "/usr/bin/python$minor" "$home/bin/python"
printf 'home = /usr/bin\ninclude-system-site-packages = false\n' >"$home/pyvenv.cfg"
cat >"$home/bin/gpu-doctor" <<'EOF'
#!/opt/gpu-doctor/bin/python -I
import sys

from doctor.__main__ import main

sys.exit(main())
EOF
chmod 755 "$home/bin/gpu-doctor"
# Compiled here, never written on the node: nothing is left behind when the package goes.
"$python" -m compileall -q --invalidation-mode unchecked-hash -s "$work" "$home/lib"
find "$home" -type d -exec chmod 755 {} +
find "$home/lib" -type f -exec chmod a+r {} +

version=$("$python" -c 'import re, sys; print(re.search(r"__version__ = \"(.+)\"", open(sys.argv[1]).read())[1])' \
    "$here/doctor/__init__.py")
arch=$(uname -m | sed 's/x86_64/amd64/; s/aarch64/arm64/')
cd "$here"
for kind in deb rpm; do
    HOME_TREE=$home VERSION=${VERSION:-$version} PYTHON_PACKAGE=python$minor ARCH=$arch \
        "${NFPM:-nfpm}" package --config packaging/nfpm/nfpm.yaml --packager "$kind" --target "$out/" >/dev/null
done
ls "$out"/gpu-doctor[-_]*
