#!/usr/bin/env bash
# Installs what is missing, builds everything and runs the tests; ends with CTest's summary.
#   tests/run.sh           all but the slow tests; those that need a GPU only where there is one
#   tests/run.sh --slow    the slow ones too
#   tests/run.sh -R REGEX  further arguments go to ctest
# Where a CUDA compiler is found the CUDA code is compiled and linked too, GPU or not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

skip_labels=()
if [[ "${1:-}" == --slow ]]; then
  shift
else
  skip_labels+=(slow)
fi

deploy/install_packages.sh --tests

preset=release
if nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null); then
  preset=cuda
  export CUDACXX="${CUDACXX:-$nvcc}"
fi
if ! nvidia-smi -L >/dev/null 2>&1; then
  skip_labels+=(gpu)
fi

launchers=()
if command -v ccache >/dev/null; then
  launchers=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache)
fi

# The heaviest compilations take about 1.5 GB each.
available_kb=$(awk '/^MemAvailable:/ {print $2}' /proc/meminfo)
jobs=$((available_kb / 1500000))
((jobs < $(nproc))) || jobs=$(nproc)
((jobs > 0)) || jobs=1

echo "build: preset $preset, $jobs jobs"
log="build/$preset/configure.log"
mkdir -p "build/$preset"
cmake --preset "$preset" -DPREFILLD_TESTS=ON -DPREFILLD_WARNINGS_AS_ERRORS=ON "${launchers[@]}" >"$log" 2>&1 || { cat "$log"; exit 1; }
grep -- '-- prefilld:' "$log"
cmake --build "build/$preset" --parallel "$jobs"

exec ctest --test-dir "build/$preset" --output-on-failure --no-tests=error --parallel "$(nproc)" \
  ${skip_labels[@]:+--label-exclude "^($(IFS='|' && echo "${skip_labels[*]}"))\$"} "$@"
