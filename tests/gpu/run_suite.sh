#!/usr/bin/env bash
# Runs everything that needs a GPU: kernel and device tests, the comparison with Hugging Face
# goldens, compute-sanitizer on small shapes, and the benchmarks.
#
#   tests/gpu/run_suite.sh BUILD_DIR OUT_DIR [STEP…]    steps: tests sanitizer bench; all by default
#
# BUILD_DIR holds a build of the `cuda` preset. OUT_DIR gets facts.json (GPU, driver, CUDA, commit),
# a log per step and the benchmarks' JSON. Ends with one line per step; the exit status is the
# number of steps that failed.
set -uo pipefail

if (($# < 2)); then
  sed -n '2,9p' "$0"
  exit 2
fi
mkdir -p "$2"
build=$(cd "$1" && pwd)
out=$(cd "$2" && pwd)
shift 2
steps=("$@")
((${#steps[@]})) || steps=(tests sanitizer bench)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if ! gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1) || [[ -z $gpu ]]; then
  echo "no GPU: nvidia-smi names none" >&2
  exit 1
fi
cuda=$(nvidia-smi | sed -n 's/.*CUDA Version: \([0-9.]*\).*/\1/p')
commit=${PREFILLD_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
printf '{"gpu": "%s", "driver": "%s", "cuda": "%s", "commit": "%s"}\n' \
  "${gpu%%,*}" "${gpu##*, }" "$cuda" "$commit" | tee "$out/facts.json"

summary=()
failed=0
# step NAME COMMAND…: runs the command with its output in OUT_DIR/NAME.log, and shows the log's end
# if it fails.
step() {
  local name=$1 start=$SECONDS
  shift
  if "$@" >"$out/$name.log" 2>&1; then
    summary+=("ok      $name, $((SECONDS - start)) s")
  else
    summary+=("FAILED  $name, $((SECONDS - start)) s")
    failed=$((failed + 1))
    grep -E 'FAILED|Failure|rror|=========' "$out/$name.log" | head -40
    tail -5 "$out/$name.log"
  fi
}

run_tests() {
  local subject
  for subject in antidiagonal_scores attention gated_linear kv_pack layer_ops pattern pooled_mass long_prompt \
    recall_audit replay device; do
    step "$subject" "$build/tests/gpu/cuda_${subject}_test" --gtest_brief=1
  done
  step golden "$build/tests/model/golden_test" --device=cuda --gtest_brief=1
  step batch "$build/tests/model/prompt_batch_test" --device=cuda --gtest_brief=1
}

# Runs small shapes of every kernel, because compute-sanitizer is one to two orders slower. The test
# that causes a device fault and the tensors past 2^31 elements belong to the plain run.
run_sanitizer() {
  local tool filter subject
  for tool in memcheck racecheck synccheck; do
    for subject in antidiagonal_scores attention gated_linear kv_pack layer_ops pattern; do
      filter='*'
      [[ $subject == antidiagonal_scores ]] && filter='*-Large/*:*CpuChooses*'
      [[ $subject == attention ]] &&
        filter='Common/*AboveA*:Common/*Mass*:Common/*Offset*:Common/*LastRow*:Common/*Ratio*:Common/*Blocks*:Large/*Tiles*-*Refuses*'
      [[ $subject == gated_linear ]] && filter='*-*ManyTiles*:*Times*'
      [[ $subject == pattern ]] && filter='*-Large/*:*VerticalSlashEquals*:*OfClusters*:*MoreKeys*:*MeasurePattern*:*FewQueries*'
      # racecheck fails in kernels of cuBLAS, even if it is told to leave them alone.
      [[ $tool == racecheck && $subject == layer_ops ]] && filter='*-*Linear*'
      [[ $tool == racecheck && $subject == gated_linear ]] && filter='*FusedEquals*'
      step "$tool.$subject" compute-sanitizer --tool "$tool" --error-exitcode 9 \
        --report-api-errors no --kernel-name kernel_substring=prefilld \
        "$build/tests/gpu/cuda_${subject}_test" --gtest_brief=1 --gtest_filter="$filter"
    done
  done
  # This runs the whole engine, with layers ahead and replayed ones.
  step memcheck.replay compute-sanitizer --tool memcheck --error-exitcode 9 --report-api-errors no \
    --kernel-name kernel_substring=prefilld "$build/tests/gpu/cuda_replay_test" --gtest_brief=1
  step memcheck.batch compute-sanitizer --tool memcheck --error-exitcode 9 --report-api-errors no \
    --kernel-name kernel_substring=prefilld "$build/tests/model/prompt_batch_test" --device=cuda \
    --gtest_brief=1
}

run_bench() {
  local bench="$build/bin/prefill-bench" heads
  for heads in 28/4 32/8; do
    step "bench.attention.${heads/\//_}" "$bench" --mode=attention --device=cuda \
      --heads="${heads%/*}" --kv_heads="${heads#*/}" --tokens=8192,32768,131072 \
      --commit="$commit" --json="$out/attention_${heads/\//_}.json"
  done
  for heads in 28/4 32/8; do
    step "bench.scores.${heads/\//_}" "$bench" --mode=scores --device=cuda \
      --heads="${heads%/*}" --kv_heads="${heads#*/}" --tokens=8192,32768,131072 \
      --commit="$commit" --json="$out/scores_${heads/\//_}.json"
  done
  step bench.layer "$bench" --mode=layer --device=cuda --tokens=8192,32768 \
    --commit="$commit" --json="$out/layer.json"
}

for name in "${steps[@]}"; do
  case $name in
    tests | sanitizer | bench) "run_$name" ;;
    *) echo "unknown step $name" >&2; exit 2 ;;
  esac
done
printf '%s\n' "${summary[@]}"
exit "$failed"
