// Tests that rotations equal those of transformers. The numbers come from
// tests/python/make_goldens.py.
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "model/checkpoint/config.h"
#include "tests/model/temporary_folder.h"

namespace prefilld::model {
namespace {

using nlohmann::json;

// The power and the divisions round differently, by a few units in the last place of fp32.
constexpr float kRelativeTolerance = 5e-7f;

TEST(MakeRopeTable, EqualsTransformers) {
  std::ifstream file("tests/model/goldens/rope_cases.json");
  const json cases = json::parse(file);
  ASSERT_GE(cases.size(), 16u);
  TemporaryFolder folder;
  for (const json& golden : cases) {
    SCOPED_TRACE(golden["name"].get<std::string>() + " " + golden["num_tokens"].dump());
    folder.Write("config.json", golden["config"].dump());
    const absl::StatusOr<ModelConfig> config = LoadModelConfig(folder.path());
    ASSERT_TRUE(config.ok()) << config.status();
    const RopeTable table = MakeRopeTable(*config, golden["num_tokens"].get<int64_t>());
    const auto expected = golden["inv_freq"].get<std::vector<float>>();
    ASSERT_EQ(table.inv_freq.size(), expected.size());
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_NEAR(table.inv_freq[i], expected[i], kRelativeTolerance * expected[i]) << i;
    }
    EXPECT_FLOAT_EQ(table.attention_factor, golden["attention_factor"].get<float>());
  }
}

TEST(MakeRopeTable, OnlyDynamicNtkDependsOnTheLength) {
  ModelConfig config;
  config.head_dim = 64;
  config.rope.factor = 2.0;
  config.rope.original_max_positions = 1024;
  config.rope.high_freq_factor = 4.0;
  for (const RopeKind kind : {RopeKind::kDefault, RopeKind::kLinear, RopeKind::kLlama3,
                              RopeKind::kYarn, RopeKind::kDynamicNtk}) {
    config.rope.kind = kind;
    const RopeTable within = MakeRopeTable(config, 1);
    EXPECT_EQ(within.inv_freq, MakeRopeTable(config, 1024).inv_freq);
    EXPECT_EQ(within.inv_freq == MakeRopeTable(config, 1025).inv_freq,
              kind != RopeKind::kDynamicNtk);
  }
}

}  // namespace
}  // namespace prefilld::model
