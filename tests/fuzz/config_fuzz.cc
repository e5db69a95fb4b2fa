// Fuzzes configurations as a model folder might hold them. One that is accepted has a shape that
// can be computed with, and a rotation of finite numbers.
//
// Input: config.json, then optionally a NUL and generation_config.json.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>

#include "absl/strings/string_view.h"
#include "model/checkpoint/config.h"
#include "tests/fuzz/require.h"
#include "tests/model/temporary_folder.h"

namespace prefilld::model {
namespace {

using fuzz::Require;

void CheckRotation(const ModelConfig& config, int64_t num_tokens) {
  const RopeTable table = MakeRopeTable(config, num_tokens);
  Require(table.inv_freq.size() == static_cast<size_t>(config.head_dim / 2),
          "there is a frequency for each pair of dimensions");
  for (const float frequency : table.inv_freq) {
    Require(std::isfinite(frequency) && frequency >= 0, "frequencies are finite");
  }
  Require(std::isfinite(table.attention_factor), "the attention factor is finite");
}

void CheckConfig(const ModelConfig& config) {
  Require(config.num_layers > 0 && config.num_heads > 0 && config.num_kv_heads > 0 &&
              config.num_heads % config.num_kv_heads == 0,
          "query heads divide among KV heads");
  Require(config.head_dim == 64 || config.head_dim == 128, "the kernels know the head size");
  Require(config.vocab_size > 0 && config.hidden > 0 && config.intermediate > 0,
          "no width is empty");
  Require(PositionLimit(config) > 0, "a prompt of one token fits");
  for (const int64_t num_tokens : {int64_t{1}, int64_t{4096}, int64_t{1} << 24}) {
    CheckRotation(config, num_tokens);
  }
}

}  // namespace
}  // namespace prefilld::model

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace prefilld::model;
  static const TemporaryFolder folder;
  const absl::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t end = input.find('\0');
  folder.Write("config.json", input.substr(0, end));
  if (end == absl::string_view::npos) {
    std::filesystem::remove(folder.path() + "/generation_config.json");
  } else {
    folder.Write("generation_config.json", input.substr(end + 1));
  }
  if (const auto config = LoadModelConfig(folder.path()); config.ok()) CheckConfig(*config);
  return 0;
}
