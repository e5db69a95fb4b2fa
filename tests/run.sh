#!/usr/bin/env bash
# Installs what is missing, builds everything and runs the tests; ends with CTest's summary.
#   tests/run.sh           all but the slow tests; those that need a GPU only where there is one
#   tests/run.sh --slow    the slow ones too
#   tests/run.sh --asan    with clang, under the address and undefined-behaviour sanitizers; the build
#                          also checks which lock guards what (-Wthread-safety)
#   tests/run.sh --tsan    with clang, under the thread sanitizer: the tests of what has threads
#   tests/run.sh --fuzz    each fuzz target for 30 s, from the inputs kept in tests/fuzz/corpus
#   ... --folder NAME      after one of these: only the C++ tests of tests/NAME, or the soak; may be
#                          repeated
#   ... -R REGEX           further arguments go to ctest
# Where a CUDA compiler is found the CUDA code is compiled and linked too, GPU or not, but not under
# the sanitizers. --asan and --fuzz share a build tree.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

mode=normal
case "${1:-}" in
  --slow | --asan | --tsan | --fuzz)
    mode=${1#--}
    shift
    ;;
esac

folders=()
while [[ "${1:-}" == --folder ]]; do
  folders+=("$2")
  shift 2
done

preset=release
packages=(--tests)
options=()
targets=(all)
labels=()  # for ctest
case "$mode" in
  asan | tsan)
    preset=$mode
    packages=(--tests --clang)
    labels=(--label-exclude '^(slow|gpu|fuzz)$')
    [[ "$mode" == asan ]] || labels=(--label-exclude '^(slow|gpu|fuzz|kernels|model|corpus)$')
    ;;
  fuzz)
    preset=asan
    packages=(--tests --clang)
    targets=(prefilld_fuzz_targets)
    labels=(--label-regex '^fuzz$')
    ;;
  *)
    if nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null); then
      preset=cuda
      export CUDACXX="${CUDACXX:-$nvcc}"
    fi
    skipped=()
    [[ "$mode" == slow ]] || skipped+=(slow)
    nvidia-smi -L >/dev/null 2>&1 || skipped+=(gpu)
    [[ ${#skipped[@]} -eq 0 ]] || labels=(--label-exclude "^($(IFS='|' && echo "${skipped[*]}"))\$")
    ;;
esac

if ((${#folders[@]})); then
  targets=("${folders[@]/%/_tests}")
  labels+=(--label-regex "^($(IFS='|' && echo "${folders[*]}"))\$")
fi

deploy/install_packages.sh "${packages[@]}"
if [[ "$preset" == release || "$preset" == cuda ]]; then
  # All that the tests need is there: one that skips itself has failed.
  options+=("-DPREFILLD_PYTHON=$(tests/python/make_venv.sh build/python)" -DPREFILLD_SKIPPED_TESTS_FAIL=ON)
fi
if command -v ccache >/dev/null; then
  # The sanitizers' builds have precompiled headers.
  export CCACHE_SLOPPINESS=pch_defines,time_macros
  options+=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache)
else
  # No object is kept for the next tree: it is quicker to compile several files at a time.
  options+=(-DPREFILLD_FAST_BUILD=ON)
fi

# The heaviest compilations take about 1.5 GB each.
available_kb=$(awk '/^MemAvailable:/ {print $2}' /proc/meminfo)
jobs=$((available_kb / 1500000))
((jobs < $(nproc))) || jobs=$(nproc)
((jobs > 0)) || jobs=1

echo "build: preset $preset, $jobs jobs"
log="build/$preset/configure.log"
mkdir -p "build/$preset"
cmake --preset "$preset" -DPREFILLD_TESTS=ON -DPREFILLD_WARNINGS_AS_ERRORS=ON "${options[@]}" >"$log" 2>&1 || { cat "$log"; exit 1; }
grep -- '-- prefilld:' "$log"
cmake --build "build/$preset" --parallel "$jobs" --target "${targets[@]}"

# The thread sanitizer cannot work with every layout of memory that a kernel may choose at random.
as_laid_out=()
if [[ "$mode" == tsan ]] && setarch -R true 2>/dev/null; then
  as_laid_out=(setarch -R)
fi
exec "${as_laid_out[@]}" ctest --test-dir "build/$preset" --output-on-failure --no-tests=error --parallel "$(nproc)" "${labels[@]}" "$@"
