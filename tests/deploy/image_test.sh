#!/usr/bin/env bash
# Builds the images of deploy/Dockerfile without a daemon, looks for what need not be in them, and runs them.
# Their base is Debian's image where a registry can be reached, else a root of Debian's packages.
#   image_test.sh FOLDER [TARGET ...]     default: cpu gateway; FOLDER keeps the base for the next run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=tests/deploy/roots.sh
source tests/deploy/roots.sh
need buildah buildah debootstrap debootstrap unshare util-linux readelf binutils

folder=$1
targets=("${@:2}")
[[ ${#targets[@]} -gt 0 ]] || targets=(cpu gateway)
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
store=(--root "$folder/store" --runroot "$folder/run" --storage-driver overlay)
# Where a file system cannot be laid over another, every layer is a copy.
buildah "${store[@]}" images >/dev/null 2>&1 ||
  store=(--root "$folder/store.vfs" --runroot "$folder/run" --storage-driver vfs)
export BUILDAH_ISOLATION=chroot
b() { buildah "${store[@]}" "$@"; }

failures=0
fail() {
  echo "FAILED: $*"
  failures=$((failures + 1))
}

base=docker.io/library/debian:bookworm-slim
if ! timeout 30 buildah "${store[@]}" pull --quiet "$base" >"$folder/pull.log" 2>&1; then
  base=localhost/debian:bookworm
  if ! b inspect --type image "$base" >/dev/null 2>&1; then
    echo "no registry can be reached ($(tail -n 1 "$folder/pull.log" | cut -c1-120)): the base is of Debian's packages"
    make_root bookworm "$folder/base" || skip "no root of Debian 12 can be made"
    # Debian's own image has neither.
    rm -rf "$folder"/base/usr/share/{doc,man,locale}/* "$folder"/base/var/{cache/apt,lib/apt/lists}/*
    container=$(b from scratch)
    b copy --quiet "$container" "$folder/base" / >/dev/null
    b config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    b commit --quiet --rm "$container" "$base" >/dev/null
  fi
fi

# pip trusts what it trusts on this machine, such as a proxy's certificate.
ways=()
if [[ -r /etc/ssl/certs/ca-certificates.crt ]]; then
  printf '[global]\ncert = /run/certificates.crt\n' >"$folder/pip.conf"
  ways=(--volume "$folder/pip.conf:/etc/pip.conf:ro"
    --volume /etc/ssl/certs/ca-certificates.crt:/run/certificates.crt:ro)
fi

# check_contents TARGET ROOT: names what an image that runs has no use for.
check_contents() {
  local found
  found=$(cd "$2" && find . -xdev \( \
    -name '*.h' -o -name '*.hpp' -o -name '*.cc' -o -name '*.cu' -o -name '*.a' -o -name '*.proto' -o \
    -path './src/*' -o -path './root/.cache/*' -o -path './var/lib/apt/lists/*_*' -o -path './var/cache/apt/archives/*.deb' -o \
    -name 'cmake' -o -name 'cc1plus' -o -name 'git' -o -name '.git' -o -name 'train.py' -o \
    -path './var/cache/apt/*.bin' -o \
    -name '*.pem' -path './home/*' -o -name 'id_*' -path '*/.ssh/*' \) -type f \
    -not -path './usr/share/*' -not -path './usr/lib/python3*/*' -not -path './opt/prefilld/lib/*' | head -n 20 || true)
  [[ -z "$found" ]] || fail "$1 has: $found"
  # Nothing that the user who runs it may change, or that lends him root.
  found=$(find "$2/usr/local" "$2/opt" -xdev \( -user 65532 -o -perm -o+w -not -type l \) | head -n 5 || true)
  [[ -z "$found" ]] || fail "$1: its user may change $found"
  [[ -z "$(find "$2/usr/local" "$2/opt" -xdev -perm /6000)" ]] || fail "$1: a program of ours is setuid"
  if [[ "$1" == cpu ]]; then
    # Programs are stripped, and there are three.
    [[ "$(ls "$2/usr/local/bin")" == $'prefill-cli\nprefilld\nprefilld-decode-worker' ]] || fail "$1: $(ls "$2/usr/local/bin")"
    found=$(for program in "$2"/usr/local/bin/*; do readelf -S "$program" | grep -q debug_info && basename "$program"; done || true)
    [[ -z "$found" ]] || fail "$1: not stripped: $found"
  fi
}

key=58210
deploy/pass_key_prompt.sh 2047 $key 0.4 7 >"$folder/prompt.txt"

for target in "${targets[@]}"; do
  began=$SECONDS
  b build --quiet --format docker "${ways[@]}" --target "$target" --tag "prefilld:$target" --build-arg "DEBIAN_IMAGE=$base" \
    --file deploy/Dockerfile --ignorefile deploy/Dockerfile.dockerignore . >"$folder/$target.log" 2>&1 || {
    tail -n 30 "$folder/$target.log"
    fail "$target does not build"
    continue
  }
  container=$(b from "prefilld:$target")
  root=$(b mount "$container")
  echo "$target: built in $((SECONDS - began)) s, $(du -sh --apparent-size "$root" | cut -f1)"
  check_contents "$target" "$root"
  grep -q '"healthcheck"' <(b inspect "$container" | tr '[:upper:]' '[:lower:]') || [[ "$target" != cpu ]] ||
    fail "$target has no health check"
  user=$(b inspect --format '{{.OCIv1.Config.User}}' "$container")
  [[ "$user" == 65532:65532 ]] || fail "$target runs as '$user'"

  # As the manifests do: that user, and a file system that cannot be written to but for a scratch folder.
  if [[ "$target" == cpu ]]; then
    b run --user "$user" --volume "$PWD/tests/deploy:/test:ro" --volume "$folder/prompt.txt:/prompt.txt:ro" \
      --cap-drop all "$container" -- \
      bash /test/ask_for_the_key.sh /usr/local/bin /usr/local/share/prefilld/tiny /prompt.txt $key ||
      fail "$target does not run"
  else
    b run --user "$user" --volume "$PWD/model/tiny:/model:ro" "$container" -- bash -c '
      prefilld-gateway --model=/model --prefill=127.0.0.1:1 --listen=127.0.0.1:0 --port_file=/tmp/ports & gateway=$!
      for _ in $(seq 300); do [[ -s /tmp/ports ]] && break; sleep 0.1; done
      exec 3<>"/dev/tcp/127.0.0.1/$(sed s/.*=// /tmp/ports)"
      printf "GET /metrics HTTP/1.0\r\n\r\n" >&3
      grep -m 1 prefilld_gateway_server_up <&3 && kill $gateway && wait $gateway' || fail "$target does not run"
  fi
  b umount "$container" >/dev/null
  b rm "$container" >/dev/null
done

[[ $failures -eq 0 ]] || exit 1
echo "${targets[*]}: built from $base and run"
