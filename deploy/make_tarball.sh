#!/usr/bin/env bash
# Packs the programs of a build, the embedded model and the libraries that they need into an archive that
# runs wherever the C and C++ libraries are at least as new as the message at the end says.
#   deploy/make_tarball.sh BUILD OUT.tar.gz        such as build/release prefilld.tar.gz
set -euo pipefail
[[ $# -eq 2 && -f "$1/CMakeCache.txt" ]] || {
  echo "usage: $0 BUILD OUT.tar.gz" >&2
  exit 2
}
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
root=$stage/prefilld

for component in programs libraries; do
  cmake --install "$1" --component "$component" --prefix "$root" --strip >"$stage/log" 2>&1 || {
    cat "$stage/log" >&2
    exit 1
  }
done

# Whoever passes libraries on passes their licences on.
for library in "$root"/lib/*; do
  package=$(dpkg-query --search "*/$(basename "$library")" 2>/dev/null | cut -d: -f1 | sort -u | head -n 1 || true)
  [[ -n "$package" && -r "/usr/share/doc/$package/copyright" ]] || {
    echo "no Debian package has $(basename "$library"): its licence must be added" >&2
    continue
  }
  install -D -m 644 "/usr/share/doc/$package/copyright" "$root/share/doc/prefilld/licences/$package"
done

# newest PATTERN: the newest version of a system library's symbols that anything in it asks for.
newest() {
  find "$root/bin" "$root/lib" -type f -exec objdump -T {} + 2>/dev/null | grep -oE "$1" | sort -Vu | tail -n 1
}
tar --create --gzip --file "$2" --sort=name --owner=0 --group=0 --numeric-owner \
  --mtime='2000-01-01 00:00:00Z' --directory "$stage" prefilld
echo "$2: $(du -h "$2" | cut -f1), $(du -sh "$root" | cut -f1) unpacked; needs $(newest 'GLIBC_2\.[0-9]+') and $(newest 'GLIBCXX_[0-9.]+')"
