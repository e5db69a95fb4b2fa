#!/bin/bash
# Draws every picture of figures/: tests/evaluation/figures.sh build/evaluation/summary.json
#
# The curves are of that summary. The maps are of one pass-key prompt, recorded by prefill-calibrate.
# BUILD (build/release) has the program, PYTHON (python3) matplotlib, NumPy and safetensors.
set -euo pipefail
summary=${1:?usage: tests/evaluation/figures.sh SUMMARY}
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/retrieval"
"$python" "$root/model/tiny/tasks.py" pass_key --length 8192 --seed 11 --depth 0.4 |
  "$python" -c 'import json, sys; sys.stdout.write(json.load(sys.stdin)["prompt"])' >"$work/retrieval/pass_key.txt"
"${BUILD:-$root/build/release}/bin/prefill-calibrate" --model="$root/model/tiny" --out="$work/dumps" "$work/retrieval"
"$python" "$root/tests/evaluation/figures.py" --summary "$summary" --dump "$work/dumps/retrieval.pass_key.safetensors"
