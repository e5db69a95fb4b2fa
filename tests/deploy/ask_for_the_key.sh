#!/usr/bin/env bash
# Starts prefilld and a decode worker, and asks for a number that is hidden in a prompt. Needs nothing but
# the programs and bash, so it runs in an image and in the root of any distribution.
#   ask_for_the_key.sh BIN MODEL PROMPT_FILE KEY
set -euo pipefail
bin=$1 model=$2 prompt=$3 key=$4
logs=$(mktemp -d)
"$bin/prefilld" --model="$model" --device=cpu --listen=127.0.0.1:0 --metrics_listen= \
  --port_file="$logs/prefilld" >"$logs/prefilld.log" 2>&1 &
server=$!
worker=
end() {
  kill $server $worker 2>/dev/null || true
  wait
  rm -rf "$logs"
}
trap end EXIT

# port_of NAME: waits until the program has said it.
port_of() {
  for _ in $(seq 600); do
    [ ! -s "$logs/$1" ] || break
    sleep 0.1
  done
  [ -s "$logs/$1" ] || {
    cat "$logs/$1.log" >&2
    exit 1
  }
  sed -n 's/^grpc=//p' "$logs/$1"
}

prefill=127.0.0.1:$(port_of prefilld)
"$bin/prefilld-decode-worker" --model="$model" --device=cpu --listen=127.0.0.1:0 --prefill_address="$prefill" \
  --port_file="$logs/worker" >"$logs/worker.log" 2>&1 &
worker=$!
decode=127.0.0.1:$(port_of worker)
"$bin/prefill-cli" health --server="$prefill" --service=liveness
answer=$("$bin/prefill-cli" generate --worker="$decode" --model="$model" --text_file="$prompt" \
  --max_new_tokens=5 --quiet)
[ "$answer" = "$key" ] || {
  echo "asked for $key, the answer is $answer" >&2
  exit 1
}
kill $server
wait $server || {
  echo "prefilld ended with $?" >&2
  exit 1
}
echo "the answer is right: $answer"
