#!/usr/bin/env bash
# Tests that the shell scripts parse, pass shellcheck where it is installed, and refuse wrong
# arguments, and that the prompt script writes what it promises.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
scripts=(deploy/*.sh tests/*.sh tests/*/*.sh .ci/run)

failures=0
fail() {
  echo "FAILED: $*"
  failures=$((failures + 1))
}

for script in "${scripts[@]}"; do
  bash -n "$script" || fail "$script does not parse"
  [[ -x "$script" ]] || fail "$script is not executable"
  grep -qE '^set -e?uo pipefail$' "$script" || fail "$script takes unset variables"
done
if command -v shellcheck >/dev/null; then
  shellcheck --severity=warning --exclude=SC2164 "${scripts[@]}" || fail shellcheck
fi

for script in deploy/install_packages.sh deploy/quickstart.sh; do
  if "$script" --no-such-option >/dev/null 2>&1; then
    fail "$script accepts an unknown option"
  fi
done

# Every dependency of the Python client is among the test packages, so that its tests run.
dependencies=$(sed -n 's/^dependencies = //p' client/python/pyproject.toml | grep -oE '"[a-z]+' | tr -d '"')
[[ -n "$dependencies" ]] || fail "no dependencies in client/python/pyproject.toml"
for dependency in $dependencies; do
  grep -q "python3-$dependency " deploy/install_packages.sh || fail "python3-$dependency is not installed"
done

for bytes in 200 8191 16383; do
  prompt=$(deploy/pass_key_prompt.sh "$bytes" 58210 0.3 7 && echo .)
  prompt=${prompt%.}
  [[ ${#prompt} -eq $bytes ]] || fail "asked for $bytes bytes, got ${#prompt}"
  [[ "$prompt" == *" The pass key is 58210. Remember it. "* ]] || fail "no key in $bytes bytes"
  [[ "$prompt" == *$'\nWhat is the pass key? The pass key is ' ]] || fail "no question in $bytes bytes"
done
if deploy/pass_key_prompt.sh 50 58210 >/dev/null 2>&1; then
  fail "a prompt too short for its key"
fi

[[ $failures -eq 0 ]] || exit 1
echo "${#scripts[@]} scripts pass"
