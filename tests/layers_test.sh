#!/usr/bin/env bash
# The rules of the house that grep can check: who may include whom, what stands at the top, how long
# a file may be, how comments open, and that the READMEs name only what exists. Prints every breach;
# exits 1 on any.
#   tests/layers_test.sh [ROOT]
set -euo pipefail
cd "${1:-$(dirname "${BASH_SOURCE[0]}")/..}"

breaches=0
breach() {
  echo "$1:"
  while IFS= read -r line; do echo "  $line"; done <<<"$2"
  breaches=$((breaches + 1))
}
# check TEXT LINES: LINES is what should be empty.
check() { [[ -z "$2" ]] || breach "$1" "$2"; }

sources() {
  local folder
  for folder in "$@"; do
    find "$folder" -type f \( -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' \)
  done
}
# includes PATTERN FOLDER...: the include lines that match, in the sources of the folders.
includes() {
  local pattern=$1
  shift
  sources "$@" | xargs --no-run-if-empty grep -nE "^[[:space:]]*#[[:space:]]*include[[:space:]]*$pattern" || true
}
client_library() { find client -maxdepth 1 -type f \( -name '*.h' -o -name '*.cc' \); }

# Direction of knowledge: proto <- proto/wire, proto/process <- server -> model -> kernels.
check 'proto/ includes from above it' \
  "$(includes '"(kernels|model|server|client|tests)/' proto)"
check 'proto/wire/ includes more than proto, gRPC, Abseil, OpenSSL and the system' \
  "$(includes '[<"]' proto/wire | grep -vE '[<"](proto/(wire/|status_macros\.h)|(prefill/v1|google)/|grpc(pp)?/|absl/|xxhash\.h|openssl/)|<[a-z0-9_]+>|<((sys|netinet|arpa|linux)/)?[a-z0-9_]+\.h>' || true)"
check 'kernels/ includes something of ours from outside' \
  "$(includes '"(proto|prefill|server|model|client|tests)/' kernels)"
check 'model/ includes from above it' "$(includes '"(server|client|tests)/' model)"
check 'model/ includes more of proto/ than the status macros and, in its programs, how they start' \
  "$(includes '"proto/' model | grep -vE '"proto/status_macros\.h"|^model/calibration/.*"proto/process/(command_line|openmp_waiting)\.h"' || true)"
check 'model/ includes gRPC or protobuf' "$(includes '(<grpc|<google/protobuf|"prefill/v1/|[<"].*\.pb\.h)' model)"
check 'model/ or above includes device code' "$(includes '".*\.cuh"' model server client)"
check 'server/ includes a CUDA header' "$(includes '(<cuda|<cublas|"kernels/cuda/)' server)"
check 'server/ includes the client' "$(includes '"client/' server)"
# The Python client can be installed from a copy of its folder, so it has a copy of the contract.
check 'client/python/proto is not proto/ (cp -r proto/google proto/prefill client/python/proto/)' \
  "$(for file in $( (cd proto && find . -name '*.proto'; cd ../client/python/proto && find . -name '*.proto') | sort -u); do
    cmp -s "proto/$file" "client/python/proto/$file" || echo "$file"
  done)"
# Within model/, from the lowest folder up; calibration stands above them all.
rooms=(device checkpoint sparse prefill decode calibration)
for ((i = 0; i < ${#rooms[@]} - 1; ++i)); do
  above=$(IFS='|' && echo "${rooms[*]:i+1}")
  check "model/${rooms[i]}/ includes from above it" "$(includes "\"model/($above)/" "model/${rooms[i]}")"
done
check 'a source beside the folders of model/' \
  "$(find model -maxdepth 1 -name '*.h' -o -maxdepth 1 -name '*.cc')"
check 'the client library includes more than messages and proto/wire' \
  "$(client_library | xargs --no-run-if-empty grep -nE '^#include "(server|model|kernels|proto/process)/' || true)"
check 'client/ includes the server' "$(includes '"server/' client)"
check 'host code includes device code' \
  "$(sources kernels | grep -E '\.(h|cc)$' | xargs grep -nE '^#include ".*\.cuh"' || true)"
check 'getenv outside the options' \
  "$(sources server client model kernels | grep -v '/options\.cc$' | xargs grep -nE '\bgetenv\(' || true)"
check 'a file named after nothing' \
  "$(sources server client model kernels tests | grep -E '/(common|utils?|helpers?|misc)[^/]*$' || true)"

# Below these the transport encodes: they know messages, and no gRPC, by whatever way of includes.
# reached FILE...: the files and all of ours that they include, each once.
reached() {
  local waiting=("$@") file next
  local -A seen=()
  while [[ ${#waiting[@]} -gt 0 ]]; do
    file=${waiting[0]}
    waiting=("${waiting[@]:1}")
    [[ -e "$file" && -z "${seen[$file]:-}" ]] || continue
    seen[$file]=1
    echo "$file"
    mapfile -t next < <(sed -nE 's/^#include "([^"]+)".*/\1/p' "$file")
    waiting+=("${next[@]}")
  done
}
check 'gRPC above the transport' \
  "$(reached server/{admission,transport,lane_queue,delivery,request_record,prefill_job,prefill_pass,kv_packer,scheduler}.{h,cc} |
    xargs grep -nE '^#include (<grpc|"[^"]*\.grpc\.pb\.h")' || true)"

# Every header says once-only, and no source is longer than a reader's patience.
check 'no include guard or #pragma once' \
  "$(sources proto kernels model server client tests | grep -E '\.(h|cuh)$' | grep -v -e '-inl\.h$' |
    xargs --no-run-if-empty grep -LE '^#(pragma once|ifndef PREFILLD_)' || true)"
check 'over 450 lines' \
  "$({ sources proto kernels model server client tests; find model client tests deploy -name '*.py' -o -name '*.sh'; } |
    xargs wc -l | awk '$2 != "total" && $1 > 450')"
# Nor is a subject scattered over many tiny files.
check 'the median length of the C++ and CUDA files is not above 80 lines: merge tiny ones that share a subject' \
  "$(sources proto kernels model server client tests | xargs wc -l | awk '$2 != "total" { print $1 }' | sort -n |
    awk '{ lines[NR] = $1 }
      END { median = (lines[int((NR + 1) / 2)] + lines[int(NR / 2) + 1]) / 2; if (median <= 80) print median " lines" }')"

# A comment says who does what, so no block of comment lines and no docstring opens with a word that
# leaves the subject out. riddles MARK FILE...: the first lines of blocks of MARK that do.
riddles() {
  local mark=$1
  shift
  awk -v mark="$mark" '
    FNR == 1 { inside = 0 }
    { comment = $0 ~ "^[[:space:]]*" mark }
    comment && !inside && $0 ~ "^[[:space:]]*" mark "+[[:space:]]*(Of|By|What|Which|Whose)[^[:alpha:]]" ||
        mark == "#" && /^[[:space:]]*r?"""(Of|By|What|Which|Whose)[^[:alpha:]]/ {
      print FILENAME ":" FNR ": " $0
    }
    { inside = comment }' "$@" /dev/null
}
rooms_of_comments=(proto kernels server model client deploy tests)
mapfile -t slashed < <({ sources "${rooms_of_comments[@]}"; find proto -name '*.proto'; })
mapfile -t hashed < <(find CMakeLists.txt "${rooms_of_comments[@]}" -type f \
  \( -name '*.py' -o -name '*.sh' -o -name '*.yaml' -o -name 'CMakeLists.txt' -o -name Dockerfile \))
check 'a comment opens with Of, By, What, Which or Whose' \
  "$(riddles // "${slashed[@]}" && riddles '#' "${hashed[@]}")"

# The top level is fixed.
top='CMakeLists\.txt|CMakePresets\.json|LICENSE|README\.md|proto|server|kernels|model|client|deploy|tests'
listed() { git ls-files 2>/dev/null | cut -d/ -f1 | sort -u || find . -maxdepth 1 -printf '%P\n'; }
check 'not in the fixed top level' "$(listed | grep -vxE "$top|build|\..*|" || true)"

# Everything that the READMEs name exists. A path stands from the top or from the README's own folder.
mapfile -t readmes < <(find . -name README.md -not -path './build/*' -not -path '*/.*/*' -printf '%P\n' | sort)
# sorted lists: what there is
words() { grep -rhowE --include='*.h' --include='*.cc' --include='*.cu' --include='*.cuh' --include='*.proto' "$@" | sort -u; }
list=$(mktemp -d)
trap 'rm -rf "$list"' EXIT
words '[A-Z][a-z]+[A-Za-z]*' proto kernels model server client >"$list/names"
{
  words '"prefilld_[a-z_]+"' proto server client
  grep -rhowE --include='*.py' '"prefilld_gateway_[a-z_]+"' client
} | tr -d '"' | sort -u >"$list/metrics"
{
  find proto server client model tests -name '*.cc' -print0 | xargs -0 cat | tr '\n' ' ' |
    grep -oE 'ABSL_FLAG\( *[a-z0-9_:<>]+, *[a-z0-9_]+,' | grep -oE '[a-z0-9_]+,$' | tr -d ,
  grep -rhE --include='*.py' --include='*.sh' -- '^ *[^# ].*--[a-z]|^ *--[a-z]' deploy model tests client |
    grep -oE -- '--[a-z][a-z0-9_-]+' | cut -c3-
} | sort -u >"$list/flags"
grep -rhoE --include=CMakeLists.txt --include='*.yaml' --include=pyproject.toml '\b(prefilld?|kv-stream)(-[a-z]+)+\b' client deploy model server tests | sort -u >"$list/programs"

# is_there README PATH: braces name several.
is_there() {
  local folder path
  folder=$(dirname "$1")
  for path in $(eval "echo $2"); do
    [[ -e "$path" || -e "$folder/$path" ]] || return 1
  done
}
# missing LIST KIND README: those of the names read that are not in the list.
missing() { sort -u | comm -23 - "$list/$1" | sed "s|.*|$3: & ($2)|"; }
readme_missing() {
  local readme=$1 path
  {
    grep -oE '(\./)?\b(deploy|tests|proto|server|kernels|model|client)/[A-Za-z0-9_./-]*[A-Za-z0-9_/]' "$readme"
    grep -oE '\]\([^)#]+' "$readme" | cut -c3- | grep -v '^https\?:'
    # In backquotes: folders and files; a name alone only if it is that of a source.
    grep -oE '`[^` ]+`' "$readme" | tr -d '`' | grep -xE '[A-Za-z0-9_./{},-]+' |
      grep -E '[a-z}0-9]/|\.(h|cc|cu|cuh|py|sh|proto|md)$' | grep -vE '^(/|build/)'
  } | sort -u | while IFS= read -r path; do
    is_there "$readme" "$path" || echo "$readme: $path"
  done
  grep -oE -- '(^|[^-A-Za-z0-9])--[a-z][a-z0-9_-]+' "$readme" | grep -oE -- '[a-z].*' |
    grep -vxE 'help|target|preset|build|gpus|python_out|grpc_python_out' | missing flags flag "$readme"
  grep -oE '\b(prefilld?|kv-stream)(-[a-z]+)+\b' "$readme" | missing programs program "$readme"
  grep -oE '\bprefilld_[a-z_]+' "$readme" | missing metrics metric "$readme"
  grep -oE '`[A-Z][a-z]+[A-Za-z]*(::[A-Z][A-Za-z]*)*`' "$readme" | tr -d '`' | sed 's/::/\n/g' |
    missing names name "$readme"
}
check 'named in a README but not there' \
  "$(for readme in "${readmes[@]}"; do readme_missing "$readme" || true; done)"

# Nor does the threat model promise what no test shows.
check 'a test that deploy/security.md names is not there' \
  "$(grep -oE '`[a-z_]+\.(cc|py)` [A-Za-z_0-9]+(; [A-Za-z_0-9]+)*' deploy/security.md | tr -d '`' |
    while read -r file names; do
      for name in ${names//;/ }; do
        [[ $name == the ]] && continue
        find tests -name "$file" -print0 | xargs -0 --no-run-if-empty grep -qwE "$name" || echo "$file: $name"
      done
    done)"

# A README that grows is no longer read: at the top bytes, in the rooms lines.
check 'README.md has more than 9000 bytes' "$(wc -c README.md | awk '$1 > 9000')"
check 'a README longer than its readers are patient' "$(
  while read -r most readme; do
    awk -v most="$most" 'END { if (NR > most) print FILENAME ": " NR " lines, at most " most }' "$readme"
  done <<'LIMITS'
40 server/README.md
40 client/decode_worker/README.md
40 tests/README.md
60 model/README.md
LIMITS
)"

if [[ $breaches -gt 0 ]]; then
  echo "$breaches rules broken"
  exit 1
fi
echo "all rules hold"
