#include "tests/model/golden.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/strip.h"
#include "model/checkpoint/weight_conversion.h"
#include "tests/model/safetensors_image.h"

namespace prefilld::model {
namespace {

using kernels::DType;
using nlohmann::json;

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  content << file.rdbuf();
  return content.str();
}

uint64_t Fnv1a(const std::string& text) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return hash;
}

uint64_t SplitMix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// Each value is mean + k / 2^shift, where k is the signed top byte of the name's random stream.
std::vector<float> Values(const std::string& name, size_t count, double mean, int shift) {
  const uint64_t seed = Fnv1a(name);
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) {
    const uint64_t random = SplitMix64(seed + (i + 1) * 0x9e3779b97f4a7c15);
    const auto k = static_cast<int8_t>(random >> 56);
    values[i] = static_cast<float>(mean + std::ldexp(k, -shift));
  }
  return values;
}

ImageTensor MakeTensor(const std::string& name, const json& recipe) {
  ImageTensor tensor{name, recipe.at("dtype"), recipe.at("shape"), ""};
  size_t count = 1;
  for (const int64_t extent : tensor.shape) count *= static_cast<size_t>(extent);
  const std::vector<float> values = Values(name, count, recipe.at("mean"), recipe.at("shift"));
  const DType dtype = tensor.dtype == "F32"   ? DType::kFp32
                      : tensor.dtype == "F16" ? DType::kFp16
                                              : DType::kBf16;
  tensor.bytes.resize(count * SizeOf(dtype));
  ConvertElements(DType::kFp32, values.data(), dtype, tensor.bytes.data(),
                  static_cast<int64_t>(count));
  return tensor;
}

}  // namespace

GoldenCheckpoint::GoldenCheckpoint(const std::string& case_dir) : case_dir_(case_dir) {
  const std::string recipe_path = case_dir + "/checkpoint.json";
  if (!std::filesystem::exists(recipe_path)) return;
  made_ = std::make_unique<TemporaryFolder>();
  made_->Write("config.json", ReadFile(case_dir + "/config.json"));
  const json shards = json::parse(ReadFile(recipe_path));
  json weight_map = json::object();
  for (const auto& [file, tensors] : shards.items()) {
    std::vector<ImageTensor> image;
    for (const auto& [name, recipe] : tensors.items()) {
      image.push_back(MakeTensor(name, recipe));
      weight_map[name] = file;
    }
    made_->Write(file, SafetensorsImage(image));
  }
  if (shards.size() > 1) {
    made_->Write("model.safetensors.index.json", json({{"weight_map", weight_map}}).dump());
  }
}

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
