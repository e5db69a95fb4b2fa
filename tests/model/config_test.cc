#include "model/checkpoint/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>

#include "tests/model/config_files.h"
#include "tests/model/temporary_folder.h"

namespace prefilld::model {
namespace {

using ::nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(LoadModelConfig, ReadsLlama31) {
  const auto config = Load(Llama());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->family, Family::kLlama);
  EXPECT_EQ(config->vocab_size, 128256);
  EXPECT_EQ(config->hidden, 4096);
  EXPECT_EQ(config->intermediate, 14336);
  EXPECT_EQ(config->num_layers, 32);
  EXPECT_EQ(config->num_heads, 32);
  EXPECT_EQ(config->num_kv_heads, 8);
  EXPECT_EQ(config->head_dim, 128);  // hidden_size / num_attention_heads
  EXPECT_EQ(config->max_positions, 131072);
  EXPECT_EQ(config->rms_norm_epsilon, 1e-5);
  EXPECT_FALSE(config->qkv_bias || config->output_bias || config->qk_norm);
  EXPECT_FALSE(config->tied_embeddings);
  EXPECT_EQ(config->rope.kind, RopeKind::kLlama3);
  EXPECT_EQ(config->rope.theta, 500000.0);
  EXPECT_EQ(config->rope.factor, 8.0);
  EXPECT_EQ(config->rope.original_max_positions, 8192);
  EXPECT_THAT(config->eos_token_ids, ElementsAre(128001, 128008, 128009));
}

TEST(LoadModelConfig, KnowsWhatEachFamilyImplies) {
  const auto qwen2 = Load(Qwen2());
  ASSERT_TRUE(qwen2.ok()) << qwen2.status();
  EXPECT_TRUE(qwen2->qkv_bias);
  EXPECT_FALSE(qwen2->output_bias || qwen2->qk_norm);

  const auto qwen3 =
      LoadWith(Qwen2(), R"({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"],
                   "attention_bias": false, "num_attention_heads": 32})");
  ASSERT_TRUE(qwen3.ok()) << qwen3.status();
  EXPECT_TRUE(qwen3->qk_norm);
  EXPECT_FALSE(qwen3->qkv_bias);
  EXPECT_EQ(qwen3->head_dim, 128);  // assumed, not 3584 / 32

  const auto mistral = Load(Mistral());
  ASSERT_TRUE(mistral.ok()) << mistral.status();
  EXPECT_FALSE(mistral->qkv_bias || mistral->qk_norm);

  const auto llama = LoadWith(Llama(), R"({"attention_bias": true, "num_key_value_heads": null})");
  ASSERT_TRUE(llama.ok()) << llama.status();
  EXPECT_TRUE(llama->qkv_bias && llama->output_bias);
  EXPECT_EQ(llama->num_kv_heads, 32);
}

TEST(LoadModelConfig, ReadsBothFormsOfRope) {
  const auto rope = [](const char* patch) {
    const auto config = LoadWith(Qwen2(), patch);
    EXPECT_TRUE(config.ok()) << config.status();
    return config.ok() ? config->rope : RopeConfig();
  };
  EXPECT_EQ(rope(R"({"rope_theta": null})").theta, 10000.0);
  for (const char* yarn :
       {R"({"rope_scaling": {"type": "yarn", "factor": 4.0,
                             "original_max_position_embeddings": 32768}})",
        R"({"rope_theta": null,
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1000000, "factor": 4,
                                "original_max_position_embeddings": 32768}})",
        R"({"rope_parameters": {"rope_type": "yarn", "type": "yarn", "factor": 4},
            "rope_scaling": {"rope_type": "yarn", "type": "yarn", "factor": 4}})"}) {
    const RopeConfig read = rope(yarn);
    EXPECT_EQ(read.kind, RopeKind::kYarn) << yarn;
    EXPECT_EQ(read.theta, 1000000.0) << yarn;
    EXPECT_EQ(read.factor, 4.0) << yarn;
    EXPECT_EQ(read.original_max_positions, 32768) << yarn;
  }
}

TEST(LoadModelConfig, CompletesEosIdsFromTheGenerationConfig) {
  TemporaryFolder folder;
  folder.Write("config.json", Qwen2().dump());
  folder.Write("generation_config.json",
               R"({"eos_token_id": [151645, 151643], "temperature": 0.7, "anything": "else"})");
  const auto config = LoadModelConfig(folder.path());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_THAT(config->eos_token_ids, ElementsAre(151645, 151643));
  folder.Write("generation_config.json", R"({"eos_token_id": 1.5})");
  EXPECT_THAT(Reason(LoadModelConfig(folder.path())),
              AllOf(HasSubstr("generation_config.json"), HasSubstr("eos_token_id 1.5")));
}

TEST(LoadModelConfig, LimitsDualChunkAttentionToOneChunk) {
  const char* patch = R"({"max_position_embeddings": 1010000, "sliding_window": null,
      "dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192,
                                      "original_max_position_embeddings": 262144}})";
  const auto config = LoadWith(Qwen2(), patch);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->max_positions, 262144 - 8192);
  EXPECT_THAT(Reason(LoadWith(Llama(), patch)), HasSubstr("unsupported beside a scaled RoPE"));
  EXPECT_THAT(Reason(LoadWith(Qwen2(), R"({"dual_chunk_attention_config": {"chunk_size": 8,
                                                                          "local_size": 8}})")),
              HasSubstr("dual_chunk_attention_config.chunk_size 8"));
}

TEST(LoadModelConfig, SaysWhenThereIsNoFile) {
  TemporaryFolder folder;
  EXPECT_EQ(LoadModelConfig(folder.path()).status().code(), absl::StatusCode::kNotFound);
}

TEST(LoadModelConfig, RefusesTextThatIsNoConfig) {
  EXPECT_THAT(Reason(LoadText("")), HasSubstr("not JSON"));
  EXPECT_THAT(Reason(LoadText("[]")), HasSubstr("not a JSON object"));
  EXPECT_THAT(Reason(LoadText(R"({"hidden_size": NaN})")), HasSubstr("not JSON"));
  EXPECT_THAT(Reason(LoadText(R"({"a": 1, "a": 2})")), HasSubstr("key \"a\" twice"));
  EXPECT_THAT(Reason(LoadText(std::string(100000, '['))), HasSubstr("nested deeper"));
}

// Any change of bytes yields a config or an error that says why.
TEST(LoadModelConfig, SurvivesMutatedFiles) {
  const std::string alphabet = "{}[]\",:-0123456789.eE \\\xff";
  std::mt19937 random(7);
  TemporaryFolder folder;
  for (int round = 0; round < 3000; ++round) {
    std::string text = round % 2 == 0 ? Llama().dump() : Qwen2().dump();
    for (uint32_t edits = 1 + random() % 3; edits > 0; --edits) {
      const size_t at = random() % text.size();
      if (random() % 2 == 0) text[at] = alphabet[random() % alphabet.size()];
      if (random() % 4 == 0) text.insert(at, 1, alphabet[random() % alphabet.size()]);
    }
    folder.Write("config.json", text);
    const absl::StatusOr<ModelConfig> config = LoadModelConfig(folder.path());
    if (config.ok()) {
      EXPECT_GT(MakeRopeTable(*config, 1000).attention_factor, 0.0f);
    } else {
      EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument) << text;
    }
  }
}

struct Refusal {
  json (*base)();
  const char* patch;
  const char* message;
};

class RefusedConfigTest : public testing::TestWithParam<Refusal> {};

TEST_P(RefusedConfigTest, NamesFieldAndValue) {
  const absl::Status status = LoadWith(GetParam().base(), GetParam().patch).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << GetParam().patch;
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().message)) << GetParam().patch;
}

INSTANTIATE_TEST_SUITE_P(
    Family, RefusedConfigTest,
    testing::Values(
        Refusal{Llama, R"({"model_type": "gpt_neox"})",
                "model_type \"gpt_neox\" unsupported; built for llama, qwen2, qwen3, mistral"},
        Refusal{Llama, R"({"model_type": null})", "model_type (absent) unsupported"},
        Refusal{Llama, R"({"architectures": ["LlamaForSequenceClassification"]})",
                "architectures [\"LlamaForSequenceClassification\"] unsupported"}));

INSTANTIATE_TEST_SUITE_P(
    Shape, RefusedConfigTest,
    testing::Values(
        Refusal{Llama, R"({"vocab_size": null})", "vocab_size is missing"},
        Refusal{Llama, R"({"vocab_size": 0})", "vocab_size 0 is not an integer in [1, "},
        Refusal{Llama, R"({"vocab_size": 1e30})", "vocab_size 1e+30 is not an integer"},
        Refusal{Llama, R"({"vocab_size": 18446744073709551615})",
                "vocab_size 18446744073709551615 is not an integer"},
        Refusal{Llama, R"({"hidden_size": -4096})", "hidden_size -4096 is not an integer"},
        Refusal{Llama, R"({"hidden_size": "4096"})", "hidden_size \"4096\" is not an integer"},
        Refusal{Llama, R"({"hidden_size": 4096.5})", "hidden_size 4096.5 is not an integer"},
        Refusal{Llama, R"({"hidden_size": 4100, "head_dim": 128})",
                "hidden_size 4100 unsupported; must be a multiple of 8"},
        Refusal{Llama,
                R"({"hidden_size": 584, "num_attention_heads": 9, "num_key_value_heads": 9})",
                "hidden_size 584 is not a multiple of num_attention_heads 9"},
        Refusal{Llama, R"({"num_hidden_layers": 100000})", "num_hidden_layers 100000"},
        Refusal{Llama, R"({"num_attention_heads": 0})", "num_attention_heads 0"},
        Refusal{Llama, R"({"num_key_value_heads": 5})",
                "num_attention_heads 32 is not a multiple of num_key_value_heads 5"},
        Refusal{Llama, R"({"head_dim": 96})", "head_dim 96 unsupported; built for 64, 128"},
        Refusal{Llama, R"({"hidden_size": 3072})", "head_dim 96 unsupported"},
        Refusal{Llama, R"({"max_position_embeddings": 0})", "max_position_embeddings 0"},
        Refusal{Llama, R"({"rms_norm_eps": -1})", "rms_norm_eps -1 is not a number in [0, 1]"},
        Refusal{Llama, R"({"rms_norm_eps": "tiny"})", "rms_norm_eps \"tiny\" is not a number"}));

INSTANTIATE_TEST_SUITE_P(
    Feature, RefusedConfigTest,
    testing::Values(
        Refusal{Llama, R"({"hidden_act": "gelu"})", "hidden_act \"gelu\" unsupported"},
        Refusal{Llama, R"({"mlp_bias": true})", "mlp_bias true unsupported"},
        Refusal{Llama, R"({"attention_bias": 1})", "attention_bias 1 is not true or false"},
        Refusal{Qwen2, R"({"is_causal": false})", "is_causal false unsupported"},
        Refusal{Qwen2, R"({"attention_bias": false})",
                "attention_bias false unsupported for qwen2"},
        Refusal{Mistral, R"({"attention_bias": true})", "attention_bias true unsupported"},
        Refusal{Mistral, R"({"sliding_window": 4096})",
                "sliding_window 4096 unsupported below the model's 32768 positions: 32 of 32 "
                "layers use it"},
        Refusal{Qwen2,
                R"({"use_sliding_window": true, "sliding_window": 4096, "max_window_layers": 21})",
                "sliding_window 4096 unsupported below the model's 32768 positions: 7 of 28"},
        Refusal{Qwen2,
                R"({"use_sliding_window": true, "max_window_layers": 0, "sliding_window": -1})",
                "sliding_window -1 is not an integer"},
        Refusal{Qwen2, R"({"layer_types": ["sliding_attention"]})",
                "layer_types [\"sliding_attention\"] unsupported"},
        Refusal{Llama, R"({"quantization_config": {"bits": 4}})",
                "quantization_config {\"bits\":4} unsupported: quantised weights"},
        Refusal{Llama, R"({"partial_rotary_factor": 0.5})",
                "partial_rotary_factor 0.5 unsupported"},
        Refusal{Llama, R"({"attention_multiplier": 0.1})", "attention_multiplier 0.1 unsupported"},
        Refusal{Llama, R"({"eos_token_id": "</s>"})", "eos_token_id \"</s>\" is not a token id"},
        Refusal{Llama, R"({"eos_token_id": [4294967296]})", "eos_token_id [4294967296]"}));

INSTANTIATE_TEST_SUITE_P(
    Rope, RefusedConfigTest,
    testing::Values(
        Refusal{Qwen2, R"({"rope_scaling": {"rope_type": "longrope"}})",
                "rope_scaling.rope_type \"longrope\" unsupported; built for default, linear, "
                "dynamic, llama3, yarn"},
        Refusal{Qwen2, R"({"rope_scaling": {"type": "mrope"}})", "rope_scaling.type \"mrope\""},
        Refusal{Qwen2, R"({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}})",
                "rope_scaling.type \"linear\" contradicts rope_type yarn"},
        Refusal{Qwen2, R"({"rope_scaling": {"type": "linear"}})", "rope_scaling.factor is missing"},
        Refusal{Qwen2, R"({"rope_scaling": {"type": "linear", "factor": 0.5}})",
                "rope_scaling.factor 0.5 is not a number in [1, "},
        Refusal{Qwen2, R"({"rope_scaling": {"type": "linear", "factor": 2, "shape": "odd"}})",
                "rope_scaling.shape \"odd\" unsupported"},
        Refusal{Qwen2, R"({"rope_scaling": "yarn"})", "rope_scaling \"yarn\" is not an object"},
        Refusal{Qwen2, R"({"rope_theta": 0})", "rope_theta 0 is not a number in [2, "},
        Refusal{Qwen2, R"({"rope_theta": 1e300})", "rope_theta 1e+300 is not a number"},
        Refusal{Qwen2, R"({"rope_parameters": {"rope_theta": 10000.0}})",
                "rope_parameters.rope_theta 10000.0 contradicts rope_theta 1e+06"},
        Refusal{Qwen2,
                R"({"rope_parameters": {"rope_type": "default"},
                    "rope_scaling": {"type": "linear", "factor": 2}})",
                "contradicts rope_parameters"},
        Refusal{Qwen2, R"({"rope_parameters": {"full_attention": {"rope_type": "default"}}})",
                "rope_parameters.full_attention {\"rope_type\":\"default\"} unsupported"},
        Refusal{Qwen2, R"({"rope_parameters": {"partial_rotary_factor": 0.25}})",
                "rope_parameters.partial_rotary_factor 0.25 unsupported"},
        Refusal{Llama, R"({"rope_scaling": {"high_freq_factor": 1.0}})",
                "rope_scaling.high_freq_factor 1.0 is not above low_freq_factor 1"},
        Refusal{Llama, R"({"rope_scaling": {"original_max_position_embeddings": 0}})",
                "rope_scaling.original_max_position_embeddings 0"},
        Refusal{Llama, R"({"original_max_position_embeddings": 4096})",
                "contradicts original_max_position_embeddings 4096"},
        Refusal{Qwen2,
                R"({"rope_scaling": {"type": "dynamic", "factor": 2,
                                     "original_max_position_embeddings": 8192}})",
                "rope_scaling.original_max_position_embeddings 8192 unsupported for dynamic"},
        Refusal{Qwen2, R"({"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 0.5}})",
                "rope_scaling.beta_fast 0.5 is below beta_slow 1"},
        Refusal{Qwen2, R"({"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 0}})",
                "rope_scaling.attention_factor 0 is not a number"}));

TEST(LoadModelConfig, RefusesAMistralFileThatLeavesTheWindowToTheDefault) {
  json config = Mistral();
  config.erase("sliding_window");
  EXPECT_THAT(
      Reason(Load(config)),
      HasSubstr("sliding_window (absent) unsupported below the model's 32768 positions: 32 of 32 "
                "layers use it; absent means 4096 to mistral"));
}

}  // namespace
}  // namespace prefilld::model
