#!/usr/bin/env bash
# Runs a CUDA compile command, and fails it where a kernel keeps values in local memory (a stack
# frame or spilled registers) without being listed with a reason, or is listed and keeps none. CMake
# puts this script before the compiler; ptxas -v, asked for by the build, reports the figures.
#   check_spills.sh LIST SOURCE OBJECT COMMAND...
set -euo pipefail
list=$1 source=$2 object=$3
shift 3
[[ "$source" == *.cu ]] || exec "$@"

# Without it ptxas says nothing, as it does for a source that has no kernels.
[[ "$*" == *-Xptxas=-v* ]] || { echo "$source: compiled without -Xptxas=-v" >&2; exit 1; }

log=$(mktemp)
trap 'rm -f "$log"' EXIT
"$@" 2>"$log" || { code=$?; cat "$log" >&2; exit "$code"; }

# Everything that the compiler said apart from the figures is passed on.
figures='^ptxas info +: (Compiling entry function|Function properties|Used |Compile time|[0-9]+ bytes gmem)|bytes stack frame'
grep -vE "$figures" "$log" >&2 || true
fail() {
  rm -f "$object"
  echo "$source: $1" >&2
  exit 1
}

# One line per kernel and architecture: "arch | kernel | bytes of stack, spill stores, spill loads".
kernels=$(awk '
  /Compiling entry function/ { split($0, part, "\047"); arch = part[4] }
  /Function properties for/ { name = $NF }
  /bytes stack frame/ { print arch " | " name " | " $1 " " $5 " " $9 }' "$log" | c++filt |
  sed -E 's/void //; s/prefilld::kernels::cuda:://g; s/\(anonymous namespace\):://g; s/\([^|]*\)( \|)/\1/')

spilling=$(awk -F ' [|] ' 'NF == 3 && $3 != "0 0 0" { print $1 " | " $2 }' <<<"$kernels")
# The entries of the list that name this source: "arch | source | kernel | reason".
listed=$(awk -F ' [|] ' -v source="$source" '
  /^#/ || NF == 0 { next }
  NF != 4 || $4 == "" { print "malformed: " $0; next }
  substr(source, length(source) - length($2)) == "/" $2 { print $1 " | " $3 }' "$list")
! grep '^malformed' <<<"$listed" >&2 || fail "$list has a line that is not 'arch | source | kernel | reason'"

unlisted=$(grep -vxFf <(echo "$listed") <<<"$spilling" || true)
[[ -z "$unlisted" ]] || fail "in local memory (ptxas -v), and not in $list with a reason:
$(while IFS= read -r kernel; do grep -F "$kernel | " <<<"$kernels"; done <<<"$unlisted" |
  sed -E 's/([0-9]+) ([0-9]+) ([0-9]+)$/\1 bytes of stack, \2 of spill stores, \3 of spill loads/')"
gone=$(grep -vxFf <(echo "$spilling") <<<"$listed" || true)
[[ -z "$gone" ]] || fail "listed in $list, but no longer in local memory; take it off the list:
$gone"
