#!/usr/bin/env bash
# Runs manifests_test.py in a virtual environment, made on first use in the folder given. Exits with
# 77 (skipped, for CTest) when the schemas cannot be installed.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$1/manifests_venv
python=$venv/bin/python

if ! cmp -s "$here/requirements.txt" "$venv/installed.txt"; then
  rm -rf "$venv"
  if ! { python3 -m venv "$venv" && "$python" -m pip install --quiet --retries 1 --disable-pip-version-check \
      --requirement "$here/requirements.txt"; }; then
    echo "skipped: the Kubernetes API schemas (tests/deploy/requirements.txt) could not be installed"
    exit 77
  fi
  cp "$here/requirements.txt" "$venv/installed.txt"
fi
exec "$python" -B "$here/manifests_test.py"
