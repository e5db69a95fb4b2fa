#!/usr/bin/env bash
# Measures prefills of the embedded model through a running prefilld, with the KV received and
# verified by the client. Where a Python with transformers is given, transformers runs on the same
# CPU and threads for comparison.
#   tests/bench/prefill_bench.sh [--threads N] [--runs N] [--tokens "8192 16384"] [--python PYTHON]
# Needs the binaries in build/release/bin (./deploy/quickstart.sh or ./tests/run.sh builds them).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

threads=$(nproc)
runs=3
lengths="8192 16384"
python=python3
model=model/tiny
bin=build/release/bin
while [[ $# -gt 0 ]]; do
  case "$1" in
    --threads) threads=$2 ;;
    --runs) runs=$2 ;;
    --tokens) lengths=$2 ;;
    --python) python=$2 ;;
    --model) model=$2 ;;
    *)
      sed -n '2,6s/^# *//p' "$0" >&2
      exit 2
      ;;
  esac
  shift 2
done

work=$(mktemp -d)
server=
cleanup() {
  [[ -z "$server" ]] || kill -TERM "$server" 2>/dev/null || true
  rm -rf "$work"
}
trap cleanup EXIT

memory_mb() { awk -v key="$1:" '$1 == key {printf "%.0f", $2 / 1024}' "/proc/$server/status"; }
# number KEY FILE: prints the first number under this key in a JSON file.
number() { grep -oE "\"$1\": *[-0-9.e+]+" "$2" | head -n 1 | sed 's/.*: *//'; }

"$bin/prefilld" --model="$model" --device=cpu --cpu_threads="$threads" --max_prompt_tokens=32768 \
  --listen=127.0.0.1:0 --metrics_listen= --port_file="$work/ports" 2>"$work/prefilld.log" &
server=$!
for _ in $(seq 300); do
  [[ -s "$work/ports" ]] && break
  sleep 0.1
done
[[ -s "$work/ports" ]] || { tail "$work/prefilld.log" >&2; exit 1; }
address=127.0.0.1:$(sed -n 's/^grpc=//p' "$work/ports")
echo "$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1), $threads threads; best of $runs runs"
echo "memory of prefilld before the first prompt: $(memory_mb VmRSS) MB"

row='%8s  %-14s %-15s %10s %10s %9s\n'
# shellcheck disable=SC2059
printf "$row" tokens engine policy seconds tokens/s density
for tokens in $lengths; do
  deploy/pass_key_prompt.sh $((tokens - 1)) 58210 0.4 1 >"$work/prompt"
  for policy in dense share; do
    best=
    for _ in $(seq "$runs"); do
      "$bin/prefill-cli" prefill --server="$address" --model="$model" --text_file="$work/prompt" --policy="$policy" \
        --json --quiet >"$work/result.json"
      total=$(number total_us "$work/result.json")
      if [[ -z "$best" || "$total" -lt "$best" ]]; then best=$total; fi
    done
    # shellcheck disable=SC2059
    printf "$row" "$tokens" prefilld "$policy" \
      "$(awk "BEGIN {printf \"%.2f\", $best / 1e6}")" \
      "$(awk "BEGIN {printf \"%.0f\", $tokens * 1e6 / $best}")" \
      "$(awk "BEGIN {printf \"%.1f %%\", 100 * $(number density "$work/result.json")}")"
  done
  peak="memory of prefilld, peak after $tokens tokens: $(memory_mb VmHWM) MB"
  if "$python" -c 'import torch, transformers' 2>/dev/null; then
    for dtype in float32 bfloat16; do
      "$python" tests/bench/prefill_transformers.py "$model" "$work/prompt" --threads "$threads" \
        --dtype "$dtype" --repeats "$runs" >"$work/theirs.json" 2>"$work/theirs.log" ||
        { tail "$work/theirs.log" >&2; exit 1; }
      seconds=$(number best_s "$work/theirs.json")
      # shellcheck disable=SC2059
      printf "$row" "$tokens" transformers "dense, $dtype" "$seconds" \
        "$(awk "BEGIN {printf \"%.0f\", $tokens / $seconds}")" "100.0 %"
    done
  fi
  echo "$peak"
done
