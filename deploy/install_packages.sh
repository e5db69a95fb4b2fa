#!/usr/bin/env bash
# Installs what building prefilld needs on Debian 12. Where all of it is present, apt is not called.
#   deploy/install_packages.sh           libraries and tools of the build
#   deploy/install_packages.sh --tests   what the tests need as well
#   deploy/install_packages.sh --clang   what a build with clang and its sanitizers needs as well
set -euo pipefail

packages=(
  # tools
  cmake g++ ninja-build pkg-config protobuf-compiler protobuf-compiler-grpc
  # wire
  libgrpc++-dev libprotobuf-dev libabsl-dev libssl-dev
  # process: logs, metrics and the page that shows them
  libspdlog-dev prometheus-cpp-dev libmicrohttpd-dev
  # model and CPU kernels
  libdnnl-dev libhwy-dev libxxhash-dev nlohmann-json3-dev
)
for option in "$@"; do
  case "$option" in
    --tests)
      packages+=(
        libgtest-dev libgmock-dev
        # the Python client, and the check of the Kubernetes manifests
        python3-grpcio python3-protobuf python3-numpy python3-xxhash python3-venv
        # prefilld-gateway, and certificates for its test
        openssl
        python3-uvicorn python3-starlette python3-jinja2 python3-prometheus-client
        # calibration, and the decoder that the embedded model was trained with
        python3-scipy python3-torch
        # dashboard and alerts
        prometheus python3-yaml
      )
      ;;
    --clang)
      # llvm-14 has the symbolizer, without which the sanitizers report bare addresses.
      packages+=(clang libclang-rt-14-dev libomp-14-dev llvm-14)
      ;;
    *)
      echo "usage: $0 [--tests] [--clang]" >&2
      exit 2
      ;;
  esac
done

missing=()
if command -v dpkg-query >/dev/null; then
  for package in "${packages[@]}"; do
    status=$(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null || true)
    [[ "$status" == installed ]] || missing+=("$package")
  done
else
  missing=("${packages[@]}")
fi
if [[ ${#missing[@]} -eq 0 ]]; then
  echo "packages: all ${#packages[@]} present"
  exit 0
fi

release=unknown
# shellcheck source=/dev/null
[[ -r /etc/os-release ]] && release=$(. /etc/os-release && echo "${ID:-unknown} ${VERSION_ID:-}")
if [[ "$release" != "debian 12" ]]; then
  cat >&2 <<MESSAGE
prefilld is built and tested on Debian 12; this is "$release".
Install the equivalents of these packages (gRPC 1.51, Protobuf 3.21 and Abseil 20220623 are the
versions tested) and build with CMake, or use the container (deploy/Dockerfile):
  ${missing[*]}
MESSAGE
  exit 1
fi

as_root=()
if [[ $EUID -ne 0 ]]; then
  if ! command -v sudo >/dev/null; then
    echo "These packages are missing and neither root nor sudo is available:" >&2
    echo "  ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi

echo "packages: installing ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() {
  if ! "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 \
      "$@" >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "apt-get $1 failed" >&2
    exit 1
  fi
}
apt update
# The tests start a Prometheus of their own. Debian's package would start one with the machine: left
# out, its unit and its init script come with `apt-get install --reinstall prometheus`.
apt install --yes --no-install-recommends -o Dpkg::Options::=--path-exclude=/etc/init.d/prometheus \
  -o Dpkg::Options::=--path-exclude=/lib/systemd/system/prometheus.service "${missing[@]}"
echo "packages: ${#missing[@]} installed"
