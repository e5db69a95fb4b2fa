#include "model/checkpoint/ignored.h"

#include <algorithm>
#include <cstddef>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace prefilld::model {
namespace {

// The log is to show every field of a usual file, but a file may have any number of tensors.
constexpr size_t kMaxFields = 64;
constexpr size_t kMaxTensors = 8;

std::string Listed(const std::vector<std::string>& names, size_t max) {
  const auto end = names.begin() + static_cast<std::ptrdiff_t>(std::min(names.size(), max));
  std::string text = absl::StrJoin(names.begin(), end, ", ");
  if (names.size() > max) absl::StrAppend(&text, ", ... (", names.size(), " in all)");
  return text;
}

}  // namespace

std::vector<std::pair<std::string, std::string>> DescribeIgnored(
    const ModelConfig& config, const std::vector<std::string>& unused_tensors) {
  std::vector<std::pair<std::string, std::string>> ignored;
  if (!config.ignored_keys.empty()) {
    ignored.emplace_back("config_keys", Listed(config.ignored_keys, kMaxFields));
  }
  if (!unused_tensors.empty()) {
    ignored.emplace_back("tensors", Listed(unused_tensors, kMaxTensors));
  }
  return ignored;
}

}  // namespace prefilld::model
