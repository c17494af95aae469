#!/bin/sh
# Pins anew everything that the images install, from what pyproject.toml allows and constraints.txt says: needs uv and Python 3.11.
set -eu
cd "$(dirname "$0")/.."
own() { python3 deploy/requirements.py "$@"; }
pins() { uv pip compile --quiet --no-header --no-annotate "$@" -; }
say() { echo "# Everything in the images on $1. Made by deploy/constraints.sh."; }

{ say "Debian, with Python 3.11"
  { own coordinator postgresql s3 judge; echo hatchling; } |
      pins --constraint constraints.txt --python-version 3.11 --python-platform x86_64-manylinux_2_28
} >deploy/constraints-debian.txt.part
# JetPack's PyTorch is built by others, and three packages have older versions for the oldest supported Python. The last three build
# bitsandbytes.
others=$(mktemp)
trap 'rm "$others"' EXIT
grep -Ev '^(torch|transformers|typer)==' constraints.txt >"$others"
{ say "JetPack 6, with Python 3.10 and its own PyTorch"
  { own judge; echo torch==2.8.0; echo 'nvidia-cudss-cu12<0.8'; echo scikit-build-core; echo setuptools; echo wheel; } |
      pins --constraint "$others" --only-binary :all: --python-version 3.10 --python-platform aarch64-manylinux_2_35
} >deploy/constraints-jetson.txt.part
for file in deploy/constraints-*.txt.part; do mv "$file" "${file%.part}"; done
