#!/usr/bin/env bash
# Makes roots of other distributions, and runs programs in them. Sourced by tests that root runs.
set -euo pipefail

# skip REASON: ends the test as CTest knows it.
skip() {
  echo "skipped: $*"
  exit 77
}

# need PROGRAM PACKAGE ...
need() {
  [[ $EUID -eq 0 ]] || skip "roots are made by root"
  while [[ $# -gt 0 ]]; do
    command -v "$1" >/dev/null || skip "$1 is missing (Debian's package $2)"
    shift 2
  done
}

# make_root SUITE FOLDER: the least that the distribution can be, of signed packages. Keeps one that is
# there. Fails if the mirror or its keyring is missing.
make_root() {
  [[ -x "$2/bin/sh" ]] && return
  local check=(--force-check-gpg)
  # For distributions whose keyring Debian has not, and of which the root is thrown away.
  [[ -z "${PREFILLD_UNSIGNED_ROOTS:-}" ]] || check=(--no-check-gpg)
  rm -rf "$2"
  debootstrap "${check[@]}" --variant=minbase "$1" "$2" >"$2.log" 2>&1 || {
    rm -rf "$2"
    return 1
  }
}

# in_root FOLDER COMMAND ...: with the machine's /proc and /dev, which are gone when it ends.
in_root() {
  local root=$1
  shift
  # shellcheck disable=SC2016
  unshare --mount bash -c '
    mount --bind /proc "$0/proc" && mount --bind /dev "$0/dev" && exec chroot "$0" "$@"' "$root" "$@"
}
