#!/usr/bin/env bash
# Makes a virtual environment in FOLDER, unless it is there, that has Debian's Python packages and those of
# requirements.txt. Prints the path of its Python. Exits with 77 (skipped, for CTest) when they cannot be
# installed. Tests that need it may call this at the same time.
#   make_venv.sh FOLDER
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$1/manifests_venv
mkdir -p "$1"
exec 9>"$1/manifests_venv.lock"
flock 9

if ! cmp -s "$here/requirements.txt" "$venv/installed.txt"; then
  # Debian's own Python, whatever `python3` is: no other finds Debian's packages.
  if ! { /usr/bin/python3 -m venv --clear --system-site-packages "$venv" &&
    "$venv/bin/python" -m pip install --quiet --retries 1 --disable-pip-version-check \
      --requirement "$here/requirements.txt"; } >&2; then
    echo "skipped: tests/deploy/requirements.txt could not be installed" >&2
    exit 77
  fi
  cp "$here/requirements.txt" "$venv/installed.txt"
fi
echo "$venv/bin/python"
