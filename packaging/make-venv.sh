#!/bin/sh
# Make a virtual environment: make-venv.sh PYTHON DIRECTORY.
# Debian and Ubuntu split `ensurepip` off into python3-venv; where it lacks, install it if we may, else say so.
set -eu
python=$1
venv=$2
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "make: $python is not a Python 3.10 or newer; name one with PYTHON=…" >&2
    exit 1
fi
if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get install -y --no-install-recommends "$package" >/dev/null
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        sudo apt-get install -y --no-install-recommends "$package" >/dev/null
    else
        echo "make: $python can't make environments; run: sudo apt-get install $package" >&2
        exit 1
    fi
fi
exec "$python" -m venv "$venv"
