#!/usr/bin/env bash
# From a fresh clone to an answer, in one command: installs packages, builds, starts a prefill
# server and a decode worker on this machine, hides a pass key in a long prompt, asks for it, shows
# what happened, and stops both.
#
#   deploy/quickstart.sh [--tokens N] [--policy dense|vertical_slash|share|auto] [--cpu|--cuda] [--keep]
#
#   --tokens N   length of the prompt, 1000 to 16384; default 8192
#   --policy P   how attention is computed; default share
#   --cuda       build the CUDA code, --cpu leave it out; default: where there are a GPU and nvcc
#   --keep       leave both processes running
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tokens=8192
policy=share
cuda=auto
keep=no
work=build/quickstart
model=model/tiny
pids=()

usage() {
  sed -n '6,11s/^# *//p' "$0" >&2
  exit 2
}

parse_options() {
  while [[ $# -gt 0 ]]; do
    case "$1" in
      --tokens | --policy)
        [[ $# -ge 2 ]] || usage
        if [[ "$1" == --tokens ]]; then tokens=$2; else policy=$2; fi
        shift
        ;;
      --cpu) cuda=no ;;
      --cuda) cuda=yes ;;
      --keep) keep=yes ;;
      *) usage ;;
    esac
    shift
  done
  [[ "$tokens" =~ ^[0-9]+$ ]] || usage
  ((tokens >= 1000 && tokens <= 16384)) || usage
  [[ "$policy" =~ ^(dense|vertical_slash|share|auto)$ ]] || usage
}

say() { printf '\n== %s\n' "$*"; }

fail() {
  echo "quickstart: $*" >&2
  local log
  for log in "$work"/*.log; do
    [[ -s "$log" ]] || continue
    printf '\n-- last lines of %s\n' "$log" >&2
    tail -n 15 "$log" | cut -c 1-300 >&2
  done
  exit 1
}

# Runs on every exit. Ends everything that was started here unless told to keep it.
cleanup() {
  local pid
  for pid in "${pids[@]}"; do
    kill -TERM "$pid" 2>/dev/null && wait "$pid" 2>/dev/null
  done
  true
}

choose_preset() {
  local nvcc
  nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null || true)
  if [[ "$cuda" == auto ]]; then
    cuda=no
    if nvidia-smi -L >/dev/null 2>&1; then
      if [[ -n "$nvcc" ]]; then
        cuda=yes
      else
        echo "A GPU is here but no CUDA compiler (nvcc): using the CPU."
      fi
    fi
  fi
  preset=release
  if [[ "$cuda" == yes ]]; then
    preset=cuda
    export CUDACXX=${CUDACXX:-$nvcc}
  fi
  bin=build/$preset/bin
}

build() {
  local log=$work/build.log launcher=()
  if command -v ccache >/dev/null; then
    launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache)
  fi
  local tests=(-DPREFILLD_TESTS=OFF)
  [[ -f build/$preset/CMakeCache.txt ]] && tests=()
  cmake --preset "$preset" "${tests[@]}" "${launcher[@]}" >"$log" 2>&1 || fail "configuring failed"
  local build=(cmake --build "build/$preset" --target prefilld prefilld-decode-worker prefill-cli)
  if [[ -t 1 ]]; then
    "${build[@]}" || fail "the build failed"
  else
    echo "two to four minutes on two cores; follow it in $log"
    "${build[@]}" >>"$log" 2>&1 || fail "the build failed"
  fi
}

# start NAME COMMAND...: runs the command in the background and waits until it has written its
# ports.
start() {
  local name=$1
  shift
  rm -f "$work/$name.ports"
  "$@" --port_file="$work/$name.ports" >"$work/$name.log" 2>&1 &
  local pid=$! waited=0
  pids=("$pid" "${pids[@]}")
  until [[ -s "$work/$name.ports" ]]; do
    kill -0 "$pid" 2>/dev/null || fail "$name ended while starting"
    ((waited++ < 600)) || fail "$name was not ready within 60 s"
    sleep 0.1
  done
}

# port NAME KIND: prints one of the ports that a process wrote.
port() { sed -n "s/^$2=//p" "$work/$1.ports"; }

start_both() {
  start prefilld "$bin/prefilld" --model="$model" \
    --listen=127.0.0.1:0 --metrics_listen=127.0.0.1:0
  server=127.0.0.1:$(port prefilld grpc)
  metrics=127.0.0.1:$(port prefilld metrics)
  start decode-worker "$bin/prefilld-decode-worker" --model="$model" \
    --listen=127.0.0.1:0 --prefill_address="$server"
  worker=127.0.0.1:$(port decode-worker grpc)
  echo "prefilld       $server   metrics http://$metrics/metrics"
  echo "decode worker  $worker"
}

ask() {
  local key=$((SRANDOM % 90000 + 10000)) depth=$((SRANDOM % 80 + 10))
  # The beginning-of-text token is the one that is not a byte.
  deploy/pass_key_prompt.sh $((tokens - 1)) "$key" "0.$depth" "$RANDOM" >"$work/prompt.txt"
  echo "$tokens tokens of prose; at $depth % of it: \"The pass key is $key. Remember it.\""
  echo "The prompt ends: \"$(tail -n 1 "$work/prompt.txt")\""
  echo
  # Tokens come on standard output, progress and summary on standard error.
  local answer
  answer=$("$bin/prefill-cli" generate --worker="$worker" --model="$model" --text_file="$work/prompt.txt" \
    --policy="$policy" --max_new_tokens=8 | tr -d '\0') || fail "no answer"
  if [[ "$answer" == "$key"* ]]; then
    echo "answer     $answer, which is right"
  else
    echo "answer     $answer, which is WRONG: the key was $key"
    wrong=yes
  fi
}

show_metrics() {
  echo "http://$metrics/metrics, for example:"
  # /dev/tcp is built into bash, so one GET needs no other program.
  exec 3<>"/dev/tcp/${metrics%:*}/${metrics#*:}"
  printf 'GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n' >&3
  tr -d '\r' <&3 >"$work/metrics.txt"
  exec 3>&-
  grep -E '^prefilld_(requests_total\{outcome="ok"\}|time_to_first_token_seconds_sum\{.*\} (0\.|[^0])|attention_density_sum|heads_total|kv_bytes_total\{lane="0"\}|stall_seconds_total)' \
    "$work/metrics.txt" | sed 's/^/  /'
}

stop_both() {
  local pid status bad=no
  for pid in "${pids[@]}"; do
    kill -TERM "$pid"
    status=0
    wait "$pid" || status=$?
    ((status == 0)) || { echo "process $pid ended with $status" && bad=yes; }
  done
  pids=()
  [[ "$bad" == no ]] || fail "not everything ended cleanly"
  echo "both ended cleanly on SIGTERM"
}

main() {
  parse_options "$@"
  mkdir -p "$work"
  rm -f "$work"/*.log
  trap cleanup EXIT
  trap 'exit 130' INT TERM
  wrong=no

  say "packages"
  deploy/install_packages.sh
  choose_preset
  local begin=$SECONDS
  say "build ($preset)"
  build
  echo "built $bin/{prefilld,prefilld-decode-worker,prefill-cli} in $((SECONDS - begin)) s"

  begin=$SECONDS
  say "start"
  start_both
  say "ask"
  ask
  say "metrics"
  show_metrics
  if [[ "$keep" == yes ]]; then
    say "still running"
    echo "Ask:   $bin/prefill-cli generate --worker=$worker --model=$model --text='Once upon a time'"
    echo "Stop:  kill ${pids[*]}"
    pids=()
  else
    say "stop"
    stop_both
  fi
  echo "ran $((SECONDS - begin)) s"
  [[ "$wrong" == no ]]
}

main "$@"
