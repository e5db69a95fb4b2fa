#!/usr/bin/env bash
# Tests that the archive of deploy/make_tarball.sh runs in roots of other distributions that have nothing
# but their own C and C++ libraries, from any folder, and that an older C library is refused by name.
#   tarball_test.sh BUILD FOLDER        FOLDER keeps the roots for the next run
# Where a root could not be made it is skipped in the end, and says which, though nothing failed in the others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=tests/deploy/roots.sh
source tests/deploy/roots.sh
need debootstrap debootstrap unshare util-linux objdump binutils

build=$1 roots=$2/roots
mkdir -p "$roots"
archive=$2/prefilld.tar.gz
deploy/make_tarball.sh "$build" "$archive"
again=$2/again.tar.gz
deploy/make_tarball.sh "$build" "$again" >/dev/null
cmp "$archive" "$again" || {
  echo "FAILED: two archives of one build differ"
  exit 1
}
rm "$again"

failures=0
fail() {
  echo "FAILED: $*"
  failures=$((failures + 1))
}

key=58210
deploy/pass_key_prompt.sh 2047 $key 0.4 7 >"$2/prompt.txt"
ran=() missing=()
# Each with the version of its C library. The first is the one that prefilld is built on.
for suite in bookworm trixie jammy; do
  root=$roots/$suite
  if ! make_root "$suite" "$root"; then
    echo "$suite: no root could be made: $(grep -E '^E:' "$root.log" | tail -n 1)"
    missing+=("$suite")
    continue
  fi
  # No place that a build could have known.
  rm -rf "$root/srv/any where" "$root/srv/ask"
  mkdir -p "$root/srv/any where" "$root/srv/ask"
  tar --extract --gzip --file "$archive" --directory "$root/srv/any where"
  cp tests/deploy/ask_for_the_key.sh "$2/prompt.txt" "$root/srv/ask/"
  here="/srv/any where/prefilld"
  libc=$(in_root "$root" ldd --version | sed -n '1s/.* //p')
  if in_root "$root" bash /srv/ask/ask_for_the_key.sh "$here/bin" "$here/share/prefilld/tiny" \
    /srv/ask/prompt.txt $key; then
    echo "$suite (glibc $libc): runs"
    ran+=("$suite")
  else
    fail "$suite (glibc $libc)"
  fi
done
# Debian 11's C library is too old. The loader says so, and nothing starts.
if make_root bullseye "$roots/bullseye"; then
  rm -rf "$roots/bullseye/srv/prefilld"
  tar --extract --gzip --file "$archive" --directory "$roots/bullseye/srv"
  said=$(in_root "$roots/bullseye" /srv/prefilld/bin/prefilld --version 2>&1) && fail "bullseye: started: $said"
  grep -qE "version .GLIBC_2\.[0-9]+' not found" <<<"$said" || fail "bullseye: $said"
  echo "bullseye: refused: $(grep -m 1 -oE "version .GLIBC[^ ]*' not found" <<<"$said")"
else
  missing+=(bullseye)
fi

# Every library is found beside the programs, but those of the system.
libraries=$(tar --list --gzip --file "$archive" | sed -n 's|^prefilld/lib/||p' | grep .)
for forbidden in libc.so libm.so ld-linux libstdc++ libgcc_s libcuda.so; do
  grep -q "^$forbidden" <<<"$libraries" && fail "$forbidden is in the archive"
done
licences=$(tar --list --gzip --file "$archive" | grep -c '/licences/.')
((licences > 10)) || fail "only $licences licences for $(wc -l <<<"$libraries") libraries"
[[ $failures -eq 0 ]] || exit 1
echo "ran in: ${ran[*]}"
((${#missing[@]} == 0)) || skip "it did not run in ${missing[*]}, of which no root could be made"
