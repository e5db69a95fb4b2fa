#!/usr/bin/env bash
# Tests the whole service on a GPU: prefilld and a decode worker as two processes, asked by the CLI.
#
#   tests/gpu/end_to_end.sh BUILD_DIR OUT_DIR [STEP…]    steps: tiny synthetic million; the first two by default
#
#   tiny       the embedded model: pass keys in 8k, 16k and 32k tokens, every policy
#   synthetic  a Qwen2.5-7B-shaped checkpoint made here (15 GB in $TMPDIR; needs python3 with numpy): whole
#              prefills of 8k to 128k tokens, then 32k tokens through both processes
#   million    one prefill of 1,000,000 tokens of that checkpoint
# OUT_DIR gets JSON and logs, and the figures in one file end_to_end.json. The exit status is the
# number of failed steps.
set -uo pipefail

if (($# < 2)); then
  sed -n '2,11p' "$0"
  exit 2
fi
mkdir -p "$2"
bin=$(cd "$1" && pwd)/bin
out=$(cd "$2" && pwd)
shift 2
steps=("$@")
((${#steps[@]})) || steps=(tiny synthetic)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=$(mktemp -d)
checkpoint=${PREFILLD_SYNTHETIC:-$work/qwen2.5-7b-synthetic}
pids=()
trap 'kill "${pids[@]}" 2>/dev/null; rm -rf "$work"' EXIT

# start NAME COMMAND…: starts a process and waits until it has written its ports.
start() {
  local name=$1
  shift
  "$@" --port_file="$work/$name.ports" >"$out/$name.log" 2>&1 &
  pids+=($!)
  for ((i = 0; i < 1200; ++i)); do
    [[ -s "$work/$name.ports" ]] && return 0
    kill -0 "${pids[-1]}" 2>/dev/null || break
    sleep 0.1
  done
  tail -5 "$out/$name.log"
  return 1
}
port() { sed -n "s/^$2=//p" "$work/$1.ports"; }

# serve NAME MODEL TOKENS: starts both processes with that model.
serve() {
  start "$1-prefilld" "$bin/prefilld" --model="$2" --device=cuda --max_prompt_tokens="$3" --listen=127.0.0.1:0 \
    --metrics_listen=127.0.0.1:0 || return 1
  start "$1-worker" "$bin/prefilld-decode-worker" --model="$2" --device=cuda --listen=127.0.0.1:0 --lanes=4 \
    --kv_pool_tokens=$(($3 + 1024)) --prefill_address=127.0.0.1:"$(port "$1-prefilld" grpc)" || return 1
}

# Stops both processes. Each must exit with 0 on SIGTERM.
stop() {
  local pid status=0
  for pid in "${pids[@]}"; do
    kill -TERM "$pid"
    wait "$pid" || status=1
  done
  pids=()
  return $status
}

run_tiny() {
  serve tiny model/tiny 32768 || return 1
  local worker tokens policy i key right
  worker=127.0.0.1:$(port tiny-worker grpc)
  : >"$out/tiny.jsonl"
  for tokens in 8192 16384 32768; do
    for policy in dense share vertical_slash; do
      right=0
      for ((i = 0; i < 10; ++i)); do
        key=$((10000 + (tokens * 7 + i * 7919) % 90000))
        deploy/pass_key_prompt.sh $((tokens - 1)) $key 0.${i}5 $i >"$work/prompt.txt"
        "$bin/prefill-cli" generate --worker="$worker" --model=model/tiny --text_file="$work/prompt.txt" --policy=$policy \
          --max_new_tokens=5 --json >"$work/answer.json" || return 1
        grep -q "$key" "$work/answer.json" && right=$((right + 1))
        sed "1s/{/{\"expected\": \"$key\",/" "$work/answer.json" | tr -d '\n' >>"$out/tiny.jsonl"
        echo >>"$out/tiny.jsonl"
      done
      echo "tiny $tokens tokens $policy: $right of 10 right, $(grep -o '"density": *[0-9.e-]*' "$work/answer.json" | head -1)"
    done
  done
  stop
}

make_checkpoint() {
  [[ -s "$checkpoint/config.json" ]] || python3 model/synthetic/make_checkpoint.py qwen2.5-7b "$checkpoint"
}

# prompt TOKENS [SEED]: writes prompt.json.
prompt() {
  python3 model/synthetic/make_checkpoint.py qwen2.5-7b --prompt "$1" --seed "${2:-0}" >"$work/prompt.json"
}

# whole_prefill NAME TOKENS FLAGS…: runs prefill-bench and writes its JSON to
# OUT_DIR/prefill_NAME.json.
whole_prefill() {
  local name=$1 tokens=$2
  shift 2
  "$bin/prefill-bench" --mode=prefill --device=cuda --model="$checkpoint" --prompt="$work/prompt.json" \
    --tokens="$tokens" --commit="${PREFILLD_COMMIT:-}" --json="$out/prefill_$name.json" "$@"
}

run_synthetic() {
  make_checkpoint || return 1
  local tokens seed policy
  for tokens in 8192 32768; do
    prompt $tokens && whole_prefill $tokens $tokens --policies=dense,share,auto --runs=3 || return 1
  done
  prompt 131072 && whole_prefill 131072 131072 --policies=dense,share --runs=1 || return 1
  for seed in 1 2; do  # what share computes depends on the prompt
    prompt 131072 $seed && whole_prefill 131072_seed$seed 131072 --policies=share --runs=1 || return 1
  done
  serve synthetic "$checkpoint" 32768 || return 1
  prompt 32768
  python3 -c "import json,sys; print(*json.load(open(sys.argv[1])))" "$work/prompt.json" >"$work/prompt.ids"
  for policy in dense share share; do  # the first share meets the new length
    "$bin/prefill-cli" generate --worker=127.0.0.1:"$(port synthetic-worker grpc)" --token_ids_file="$work/prompt.ids" \
      --policy=$policy --max_new_tokens=16 --ignore_eos --json >"$out/synthetic_$policy.json" || return 1
    "$bin/prefill-cli" prefill --server=127.0.0.1:"$(port synthetic-prefilld grpc)" --token_ids_file="$work/prompt.ids" \
      --policy=$policy --lanes=4 --json >"$out/synthetic_prefill_$policy.json" || return 1
  done
  stop
}

run_million() {
  make_checkpoint || return 1
  prompt 1000000 && whole_prefill 1000000 1000000 --policies=share --runs=1 --nowarm_up
}

failed=0
for name in "${steps[@]}"; do
  case $name in
    tiny | synthetic | million) ;;
    *) echo "unknown step $name" >&2; exit 2 ;;
  esac
  begin=$SECONDS
  if "run_$name"; then
    echo "ok      $name, $((SECONDS - begin)) s"
  else
    echo "FAILED  $name, $((SECONDS - begin)) s"
    failed=$((failed + 1))
  fi
done
python3 tests/gpu/summarize_end_to_end.py "$out" || failed=$((failed + 1))
exit "$failed"
