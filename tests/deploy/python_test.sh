#!/usr/bin/env bash
# Runs a test of this folder in the virtual environment of make_venv.sh, which is made in FOLDER.
#   python_test.sh FOLDER TEST.py [ARGUMENT ...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$("$here/make_venv.sh" "$1") || exit
exec "$python" -B "$here/$2" "${@:3}"
