#!/usr/bin/env bash
# kernels/cuda/check_spills.sh against a compiler that is a script: no CUDA needed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
check=$root/kernels/cuda/check_spills.sh
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# compiler STACK: writes the object and says what ptxas says of two kernels, the second of which has
# that much stack and spills as much.
cat >compiler <<'EOF'
#!/usr/bin/env bash
echo object >out.o
[[ "$1" != silent ]] || exit 0
[[ "$1" != broken ]] || { echo "error: no such thing" >&2; exit 2; }
cat >&2 <<END
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8prefilld7kernels4cuda5firstEi' for 'sm_80'
ptxas info    : Function properties for _ZN8prefilld7kernels4cuda5firstEi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers
ptxas info    : (C7519) something else
ptxas info    : Compiling entry function '_ZN8prefilld7kernels4cuda6secondIiEEvT_' for 'sm_90a'
ptxas info    : Function properties for _ZN8prefilld7kernels4cuda6secondIiEEvT_
    $1 bytes stack frame, $1 bytes spill stores, $1 bytes spill loads
END
EOF
chmod +x compiler

failures=0
# expect WHAT CODE TEXT ARGUMENT: runs the check; its code and output must be these.
expect() {
  local code=0 output
  output=$("$check" list.txt "/src/kernels/${source:-a.cu}" out.o ./compiler "$4" ${ptxas--Xptxas=-v} 2>&1) || code=$?
  if [[ "$code" != "$2" || "$output" != *"$3"* ]]; then
    echo "$1: exit $code, wanted $2 and '$3':"$'\n'"$output"
    failures=$((failures + 1))
  fi
}
gone() { [[ ! -e out.o ]] || { echo "$1: the object is still there"; failures=$((failures + 1)); }; }

echo '# none' >list.txt
expect 'no local memory' 0 'C7519' 0
[[ -e out.o ]] || { echo 'no local memory: no object'; failures=$((failures + 1)); }
expect 'unlisted' 1 'sm_90a | second<int> | 16 bytes of stack' 16
gone 'unlisted'
expect 'a failing compiler' 2 'no such thing' broken
expect 'no kernels' 0 '' silent
ptxas='' expect 'no figures asked for' 1 'without -Xptxas=-v' 0
source=host.cc expect 'host code' 0 '' silent

echo 'sm_90a | kernels/a.cu | second<int> | it must' >list.txt
expect 'listed' 0 '' 16
expect 'listed in vain' 1 'take it off the list' 0
gone 'listed in vain'
echo 'sm_80 | kernels/a.cu | second<int> | another architecture' >list.txt
expect 'listed for another architecture' 1 'not in list.txt' 16
echo 'sm_90a | kernels/b.cu | second<int> | another source' >list.txt
expect 'listed for another source' 1 'not in list.txt' 16
expect 'another source is not asked for its kernels' 0 '' 0
echo 'sm_90a | kernels/a.cu | second<int>' >list.txt
expect 'no reason' 1 'reason' 16

# The list itself: its sources exist.
while IFS='|' read -r _ source _; do
  source=$(xargs <<<"$source")
  [[ -f "$root/kernels/cuda/$source" ]] || { echo "spills.txt: no $source"; failures=$((failures + 1)); }
done < <(grep -v '^#' "$root/kernels/cuda/spills.txt")

((failures == 0)) && echo 'check_spills: ok'
