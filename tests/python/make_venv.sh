#!/usr/bin/env bash
# Makes a virtual environment in FOLDER, unless it is there, that has Debian's Python packages and
# those of requirements.txt. Prints the path of its Python.
#   make_venv.sh FOLDER
set -euo pipefail
requirements=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/requirements.txt
mkdir -p "$1"
venv=$(cd "$1" && pwd)

if ! cmp -s "$requirements" "$venv/installed.txt"; then
  # Debian's own Python, whatever `python3` is: no other finds Debian's packages.
  /usr/bin/python3 -m venv --clear --system-site-packages "$venv" >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$requirements" >&2
  cp "$requirements" "$venv/installed.txt"
fi
echo "$venv/bin/python"
