#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Make or update a virtual environment with this checkout installed in it (editable).
#
#   tools/setup_venv.sh FOLDER EXTRAS PYTHON      e.g. .venv examples,test /usr/bin/python3.11
#
# FOLDER/.ready says what the environment was made from and is written last. Nothing is done when
# it matches; an environment without it was interrupted half-way and is made anew.
set -eu
cd "$(dirname "$0")/.."
. ./pins.env
folder=$1 extras=$2 python=$3

newer=$("$python" -c 'import sys; print(int(sys.version_info >= (3, 12)))')
if [ "$newer" = 1 ]; then
    megatron_core=$PIN_MEGATRON_CORE_NEWEST
else
    megatron_core=$PIN_MEGATRON_CORE_BASE
fi

base=$("$python" -c 'import sys; print(sys.base_prefix, sys.version.split()[0])')
inputs=$(cat pyproject.toml pins.env setup.py tools/setup_venv.sh | cksum)
place=$(pwd)
ready="$folder/.ready"
if [ -f "$ready" ]; then
    { read -r made_base; read -r made_inputs; read -r made_place; read -r made_extras; } < "$ready"
    if [ "$made_base" != "$base" ] || [ "$made_place" != "$place" ]; then
        echo "$folder was made by another interpreter or in another place, making it anew."
        rm -rf "$folder"
    elif [ "$made_inputs" = "$inputs" ]; then
        case ",$made_extras," in *",$extras,"*) exit 0 ;; esac
    fi
elif [ -e "$folder" ]; then
    echo "$folder is incomplete, making it anew."
    rm -rf "$folder"
fi

echo "Setting up $folder: $base, megatron-core $megatron_core, torch $PIN_TORCH (some minutes)"
rm -f "$ready"
[ -d "$folder" ] || "$python" -m venv "$folder"
cat > "$folder/constraints.txt" <<EOF
torch==$PIN_TORCH
megatron-core==$megatron_core
einops==$PIN_EINOPS
captcha==$PIN_CAPTCHA
pytest==$PIN_PYTEST
hypothesis==$PIN_HYPOTHESIS
spmd_types==$PIN_SPMD_TYPES
ruff==$PIN_RUFF
pyright==$PIN_PYRIGHT
transformers==$PIN_TRANSFORMERS
peft==$PIN_PEFT
datasets==$PIN_DATASETS
webdataset==$PIN_WEBDATASET
easy-vqa==$PIN_EASY_VQA
setuptools==$PIN_SETUPTOOLS
EOF
"$folder/bin/python" -m pip install --no-input --disable-pip-version-check --quiet \
    --constraint "$folder/constraints.txt" --editable ".[$extras]"
printf '%s\n' "$base" "$inputs" "$place" "$extras" > "$ready.new"
mv "$ready.new" "$ready"
