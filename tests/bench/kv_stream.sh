#!/usr/bin/env bash
# How fast KV comes from a prefilld to a consumer, two processes of this machine, over gRPC and in
# shared memory, verified and copied to its place, beside bare TCP: prefill-cli bench-kv with a prefilld that makes its KV up.
#   tests/bench/kv_stream.sh BIN_FOLDER [flags of prefill-cli bench-kv...]
# SERVER_FLAGS has flags for prefilld, such as --frame_bytes or --pack_threads.
set -euo pipefail
bin=$1
shift
folder=$(mktemp -d)
# shellcheck disable=SC2086  # several flags
"$bin/prefilld" --kv_bench_listen=127.0.0.1:0 --listen=127.0.0.1:0 --metrics_listen= \
  --port_file="$folder/ports" ${SERVER_FLAGS:-} 2>"$folder/log" &
server=$!
trap 'kill "$server" && wait "$server" || true; rm -rf "$folder"' EXIT
until [[ -e "$folder/ports" ]]; do
  kill -0 "$server" || { cat "$folder/log" >&2; exit 1; }
  sleep 0.05
done
port() { sed -n "s/^$1=//p" "$folder/ports"; }
"$bin/prefill-cli" bench-kv --server="127.0.0.1:$(port grpc)" --peer="127.0.0.1:$(port kv_bench)" "$@"
