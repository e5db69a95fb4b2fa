#include "tests/model/golden_file.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "absl/strings/numbers.h"
#include "absl/strings/strip.h"

namespace prefilld::model {
namespace {

[[noreturn]] void Fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  abort();
}

}  // namespace

GoldenFile::GoldenFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  content << file.rdbuf();
  content_ = content.str();
  absl::StatusOr<TensorMap> tensors =
      ParseSafetensors({reinterpret_cast<const std::byte*>(content_.data()), content_.size()});
  if (!tensors.ok()) Fail(path + ": " + tensors.status().ToString());
  tensors_ = *std::move(tensors);
}

absl::Span<const float> GoldenFile::Get(absl::string_view name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end() || found->second.dtype != kernels::DType::kFp32) {
    Fail("golden file has no fp32 tensor " + std::string(name));
  }
  return {reinterpret_cast<const float*>(found->second.data), found->second.bytes / sizeof(float)};
}

std::vector<int64_t> GoldenFile::lengths() const {
  std::vector<int64_t> lengths;
  for (const auto& [name, tensor] : tensors_) {
    absl::string_view prefix = name;
    int64_t length = 0;
    if (absl::ConsumeSuffix(&prefix, ".logits") && absl::SimpleAtoi(prefix, &length)) {
      lengths.push_back(length);
    }
  }
  std::sort(lengths.begin(), lengths.end());
  return lengths;
}

}  // namespace prefilld::model
