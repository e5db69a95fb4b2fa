#include "proto/wire/memory_socket_name.h"

#include <algorithm>
#include <optional>
#include <random>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "proto/wire/host_port.h"

namespace prefilld::wire {
namespace {

constexpr absl::string_view kPrefix = "prefilld-";
constexpr absl::string_view kSuffix = ".sock";
constexpr size_t kDigits = 16;

bool IsName(absl::string_view name) {
  return absl::ConsumePrefix(&name, kPrefix) && name.size() == kDigits &&
         std::all_of(name.begin(), name.end(),
                     [](char c) { return absl::ascii_isdigit(c) || (c >= 'a' && c <= 'f'); });
}

}  // namespace

std::string NewMemorySocketName() {
  std::random_device random;
  return absl::StrFormat("%s%08x%08x", kPrefix, random(), random());
}

std::string MemorySocketFile(absl::string_view name) { return absl::StrCat(name, kSuffix); }

bool IsMemorySocketFile(absl::string_view file_name) {
  return absl::ConsumeSuffix(&file_name, kSuffix) && IsName(file_name);
}

bool IsMemorySocketAddress(const std::string& address) {
  absl::string_view name = address;
  if (absl::ConsumePrefix(&name, "unix-abstract:")) return IsName(name);
  const std::optional<std::string> path = UnixSocketPath(address);
  return path.has_value() && IsMemorySocketFile(path->substr(path->rfind('/') + 1));
}

}  // namespace prefilld::wire
