#!/bin/sh
# Build the .deb and the .rpm: build.sh PYTHON OUT. Needs pip's index and nfpm; neither package needs anything at install.
# The program lives in its own environment, /opt/gpu-doctor, made here as it will lie there: PYTHON's version is that
# of the node's interpreter (3.10: Ubuntu 22.04; 3.11: Debian 12, python3.11 of RHEL 9; 3.12: Ubuntu 24.04), since its
# wheels are compiled for one version. $VERSION: another version than the program's own.
set -eu
python=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
here=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
home=$work/opt/gpu-doctor doc=$work/doc
mkdir "$doc"

pip() { "$python" -m pip --quiet --disable-pip-version-check "$@"; }
pip wheel --no-deps --wheel-dir "$work/wheel" "$here"
set -- "$work"/wheel/*.whl
pip install --no-compile --only-binary=:all: --target "$home/lib/python$minor/site-packages" "$1[web]"
cd "$home/lib/python$minor/site-packages"
rm -rf bin example.py # scripts of its parts, and an example that one leaves beside itself
# Modules are no scripts, and what debuggers read need not lie on every node.
find . -name '*.py' -exec sed -i '1{/^#!/d}' {} +
! command -v strip >/dev/null || find . -name '*.so' -exec strip --strip-unneeded {} +
cd "$here"

mkdir -p "$home/bin"
ln -s "/usr/bin/python$minor" "$home/bin/python"
printf 'home = /usr/bin\ninclude-system-site-packages = false\n' >"$home/pyvenv.cfg"
cat >"$home/bin/gpu-doctor" <<'EOF'
#!/opt/gpu-doctor/bin/python -I
import sys

from doctor.__main__ import main

sys.exit(main())
EOF
# Compiled here, never written on the node: nothing is left behind when the package goes.
"$python" -m compileall -q --invalidation-mode unchecked-hash -s "$work" "$home/lib"
find "$home" -type d -exec chmod 755 {} +
find "$home" -type f -exec chmod 644 {} +
chmod 755 "$home/bin/gpu-doctor"

version=${VERSION:-$("$python" -c 'import re, sys; print(re.search(r"__version__ = \"(.+)\"", open(sys.argv[1]).read())[1])' \
    doctor/__init__.py)}
maintainer="gpu-doctor <gpu-doctor@example.org>"
built=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
gzip -9n <packaging/nfpm/gpu-doctor.1 >"$doc/gpu-doctor.1.gz"
gzip -9n >"$doc/changelog.gz" <<EOF
gpu-doctor ($version) unstable; urgency=medium

  * What an operator notices stands in the project's CHANGELOG.md.

 -- $maintainer  $(LC_ALL=C date -R -u -d "@$built")
EOF
cat >"$doc/copyright" <<'EOF'
Copyright (C) 2026 the gpu-doctor authors

License: Apache-2.0; on Debian systems, in /usr/share/common-licenses/Apache-2.0.

/opt/gpu-doctor/lib holds the Python packages that the program is built on, each with its own license in its
*.dist-info folder.
EOF

arch=$(uname -m | sed 's/x86_64/amd64/; s/aarch64/arm64/')
for kind in deb rpm; do
    HOME_TREE=$home DOC_TREE=$doc VERSION=$version PYTHON_PACKAGE=python$minor ARCH=$arch MAINTAINER=$maintainer \
        "${NFPM:-nfpm}" package --config packaging/nfpm/nfpm.yaml --packager "$kind" --target "$out/" >/dev/null
done
ls "$out"/gpu-doctor[-_]"$version"*
