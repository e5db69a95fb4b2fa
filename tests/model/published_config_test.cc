// Tests configurations as they are published: they name things that they do not use, and carry
// along fields that change nothing.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "model/checkpoint/config.h"
#include "tests/model/config_files.h"

namespace prefilld::model {
namespace {

using ::nlohmann::json;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsSupersetOf;

std::vector<std::string> IgnoredKeys(const absl::StatusOr<ModelConfig>& config) {
  EXPECT_TRUE(config.ok()) << config.status();
  return config.ok() ? config->ignored_keys : std::vector<std::string>();
}

TEST(PublishedConfig, LoadsWhereWindowsNeverClose) {
  for (const auto& [base, patch] : std::initializer_list<std::pair<json, const char*>>{
           {Mistral(), R"({"sliding_window": 32768})"},
           {Mistral(), R"({"sliding_window": 32768, "use_sliding_window": true})"},
           {Qwen2(), R"({"use_sliding_window": true})"}}) {
    EXPECT_TRUE(LoadWith(base, patch).ok()) << patch;
  }
  // The longest prompt counts. YaRN makes it four times as long as max_position_embeddings.
  constexpr char kStretched[] = R"({"use_sliding_window": true, "max_window_layers": 0,
      "sliding_window": %s, "rope_scaling": {"type": "yarn", "factor": 4.0}})";
  const auto with_window = [&](const char* window) {
    std::string patch = kStretched;
    return LoadWith(Qwen2(), patch.replace(patch.find("%s"), 2, window).c_str());
  };
  EXPECT_TRUE(with_window("131072").ok());
  EXPECT_THAT(Reason(with_window("32768")), HasSubstr("below the model's 131072 positions"));
}

// transformers gives the window to no layer of these.
TEST(PublishedConfig, LoadsWhereNoLayerUsesTheWindow) {
  json qwen = Qwen2();
  qwen["sliding_window"] = 4096;
  for (const char* patch :
       {R"({"use_sliding_window": false})", R"({"use_sliding_window": null})",
        R"({"use_sliding_window": true, "max_window_layers": 28})",
        R"({"use_sliding_window": true, "max_window_layers": 99})",
        R"({"use_sliding_window": true, "max_window_layers": null})",  // 28
        R"({"use_sliding_window": true, "max_window_layers": 0, "num_hidden_layers": 2,
            "layer_types": ["full_attention", "full_attention"]})"}) {
    EXPECT_THAT(IgnoredKeys(LoadWith(qwen, patch)), Contains("sliding_window")) << patch;
  }
  EXPECT_TRUE(LoadWith(Llama(), R"({"sliding_window": 4096, "use_sliding_window": true})").ok());
}

TEST(PublishedConfig, IsRefusedWhereALayerUsesTheWindow) {
  json qwen = Qwen2();
  qwen["num_hidden_layers"] = 2;
  qwen["sliding_window"] = 4096;
  qwen["use_sliding_window"] = true;
  EXPECT_THAT(
      Reason(LoadWith(qwen, R"({"max_window_layers": 1})")),
      HasSubstr("sliding_window 4096 unsupported below the model's 32768 positions: 1 of 2"));
  EXPECT_THAT(Reason(LoadWith(qwen, R"({"layer_types": ["full_attention", "sliding_attention"]})")),
              HasSubstr("1 of 2 layers use it"));
  // transformers takes a window of 4096 where the file names none.
  EXPECT_THAT(Reason(LoadWith(qwen, R"({"max_window_layers": 0, "sliding_window": null})")),
              HasSubstr("sliding_window (absent) unsupported"));
  // To mistral, layer_types says nothing.
  EXPECT_THAT(Reason(LoadWith(Mistral(), R"({"num_hidden_layers": 1, "sliding_window": 4096,
                                             "layer_types": ["full_attention"]})")),
              HasSubstr("1 of 1 layers use it"));
  EXPECT_THAT(Reason(LoadWith(qwen, R"({"layer_types": ["full_attention", "chunked_attention"]})")),
              HasSubstr("layer_types [\"full_attention\",\"chunked_attention\"] unsupported"));
}

// These are whole files as published, with all fields that they carry.
TEST(PublishedConfig, Loads) {
  const struct {
    const char* name;
    const char* text;
  } kFiles[] = {
      {"Qwen2.5-7B-Instruct", R"({
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584,
        "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 32768,
        "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 152064})"},
      {"Qwen2.5-7B-Instruct-1M", R"({
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192,
                                        "original_max_position_embeddings": 262144},
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584,
        "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 1010000,
        "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-05,
        "rope_theta": 10000000.0, "sliding_window": 32768, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.47.1", "use_cache": true,
        "use_sliding_window": false, "vocab_size": 152064})"},
      {"Qwen3-8B", R"({
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288,
        "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000,
        "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false,
        "vocab_size": 151936})"},
      {"Llama-2-7b-hf", R"({
        "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": null, "tie_word_embeddings": false, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0", "use_cache": true, "vocab_size": 32000})"},
      {"Mistral-7B-Instruct-v0.3", R"({
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": null,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.0.dev0", "use_cache": true, "vocab_size": 32768})"},
      {"TinyLlama-1.1B-Chat-v1.0", R"({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 5632, "max_position_embeddings": 2048, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.35.0", "use_cache": true, "vocab_size": 32000})"},
      {"a Qwen2 file saved again by transformers 5", R"({
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "dtype": "bfloat16", "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 128,
        "initializer_range": 0.02, "intermediate_size": 256,
        "layer_types": ["full_attention", "full_attention"], "max_position_embeddings": 32768,
        "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 2,
        "num_hidden_layers": 2, "num_key_value_heads": 1, "pad_token_id": null,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "sliding_window": null, "tie_word_embeddings": true, "transformers_version": "5.0.0",
        "use_cache": true, "use_sliding_window": false, "vocab_size": 1000})"},
  };
  for (const auto& file : kFiles) {
    const auto config = LoadText(file.text);
    EXPECT_TRUE(config.ok()) << file.name << ": " << config.status();
  }
  // These fields are traces of the library that saved the file.
  EXPECT_TRUE(LoadWith(Llama(), R"({"_attn_implementation_autoset": true,
                                    "max_sequence_length": 2048,
                                    "tokenizer_class": "LlamaTokenizer"})")
                  .ok());
}

// Each of these stands in some published file, and transformers computes the same without it.
TEST(PublishedConfig, LoadsWithFieldsThatChangeNothing) {
  const auto llama = LoadWith(Llama(), R"({
      "auto_map": {"AutoModelForCausalLM": "modeling_custom.CustomForCausalLM"},
      "neftune_noise_alpha": 5, "model_max_length": 4096, "seq_length": 8192,
      "_flash_attn_2_enabled": true, "sep_token_id": 3, "output_hidden_states": true,
      "decoder_start_token_id": 1, "resid_pdrop": 0.1})");
  EXPECT_THAT(IgnoredKeys(llama),
              IsSupersetOf({"auto_map", "neftune_noise_alpha", "model_max_length", "seq_length",
                            "_flash_attn_2_enabled", "sep_token_id", "output_hidden_states",
                            "decoder_start_token_id", "resid_pdrop"}));
}

TEST(PublishedConfig, LoadsARopeObjectWithFieldsThatChangeNothing) {
  const auto yarn = LoadWith(Qwen2(), R"({"rope_scaling": {"type": "yarn", "factor": 16.0,
      "original_max_position_embeddings": 4096, "finetuned": true}})");
  EXPECT_THAT(IgnoredKeys(yarn), Contains("rope_scaling.finetuned"));
  EXPECT_EQ(yarn->rope.factor, 16.0);
  // The default kind has no factor, and linear no bands.
  const auto plain = LoadWith(Qwen2(), R"({"rope_parameters": {"rope_type": "default",
                                                               "factor": 4.0}})");
  EXPECT_THAT(IgnoredKeys(plain), Contains("rope_parameters.factor"));
  EXPECT_EQ(plain->rope.factor, 1.0);
  const auto linear = LoadWith(Qwen2(), R"({"rope_scaling": {"type": "linear", "factor": 2.0,
                                                             "beta_fast": 32}})");
  EXPECT_THAT(IgnoredKeys(linear), Contains("rope_scaling.beta_fast"));
  EXPECT_EQ(linear->rope.factor, 2.0);
}

TEST(PublishedConfig, LoadsWholeNumbersWrittenWithAPoint) {
  const auto config = LoadWith(Qwen2(), R"({"max_position_embeddings": 2048.0,
                                            "num_hidden_layers": 2.8e1, "eos_token_id": 2.0})");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->max_positions, 2048);
  EXPECT_EQ(config->num_layers, 28);
  EXPECT_THAT(config->eos_token_ids, ElementsAre(2));
}

TEST(PublishedConfig, TokensAreBytesOnlyWhereTheFileSaysSo) {
  EXPECT_FALSE(LoadWith(Qwen2(), R"({"vocab_size": 256})")->byte_tokens);
  EXPECT_TRUE(LoadWith(Qwen2(), R"({"byte_tokens": true})")->byte_tokens);
}

TEST(PublishedConfig, LoadsEndTokensThatNoTextHas) {
  const auto config = LoadWith(Qwen2(), R"({"eos_token_id": [-1, 7]})");
  EXPECT_THAT(IgnoredKeys(config), Contains("eos_token_id -1"));
  EXPECT_THAT(config->eos_token_ids, ElementsAre(7));
  EXPECT_TRUE(LoadWith(Qwen2(), R"({"eos_token_id": -1})")->eos_token_ids.empty());
}

TEST(PublishedConfig, NamesAllUnknownFieldsAndHowToOverruleThem) {
  EXPECT_THAT(
      Reason(LoadWith(Llama(), R"({"logit_scale": 0.5, "attention_multiplier": 0.1})")),
      AllOf(HasSubstr("attention_multiplier 0.1 unsupported"), HasSubstr("so are logit_scale"),
            HasSubstr("--ignore_config=attention_multiplier,logit_scale leaves it out")));
  EXPECT_THAT(Reason(LoadWith(Llama(), R"({"rope_scaling": {"shape": "odd"}})")),
              HasSubstr("--ignore_config=rope_scaling.shape leaves it out"));
}

TEST(PublishedConfig, LoadsWhatTheOperatorOverrules) {
  constexpr char kOdd[] = R"({"logit_scale": 0.5, "attention_multiplier": 0.1,
                              "rope_scaling": {"shape": "odd"}})";
  EXPECT_FALSE(LoadWith(Llama(), kOdd, {"logit_scale", "attention_multiplier"}).ok());
  const auto config =
      LoadWith(Llama(), kOdd, {"logit_scale", "attention_multiplier", "rope_scaling.shape"});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->rope.kind, RopeKind::kLlama3);
  // A window that is overruled is none, not the one that an absent field means.
  EXPECT_TRUE(LoadWith(Mistral(), R"({"sliding_window": 4096})", {"sliding_window"}).ok());
}

TEST(PublishedConfig, OverrulingNeedsTheFieldToBeThereAndStillNeedsTheShape) {
  EXPECT_THAT(Reason(LoadWith(Llama(), "{}", {"logit_scale"})),
              HasSubstr("config.json has no logit_scale, which --ignore_config names"));
  EXPECT_THAT(Reason(LoadWith(Llama(), "{}", {"rope_scaling.shape"})),
              HasSubstr("has no rope_scaling.shape"));
  EXPECT_THAT(Reason(LoadWith(Llama(), "{}", {"hidden_size"})),
              HasSubstr("hidden_size is missing"));
}

TEST(PublishedConfig, NamesTheQuantisation) {
  EXPECT_THAT(Reason(LoadWith(Llama(), R"({"quantization_config": {"quant_method": "gptq",
                                                                   "bits": 4}})")),
              AllOf(HasSubstr("quantization_config {"),
                    HasSubstr("unsupported: quantised weights (method \"gptq\" of 4 bits)"),
                    HasSubstr("use the model's original checkpoint"),
                    HasSubstr("--ignore_config=quantization_config")));
  EXPECT_THAT(Reason(LoadWith(Llama(), R"({"quantization_config": {"quant_method": "bitsandbytes",
                                                                   "load_in_8bit": true}})")),
              HasSubstr("(method \"bitsandbytes\" of 8 bits)"));
  EXPECT_THAT(
      Reason(LoadWith(Llama(), R"({"quantization": {"group_size": 64, "bits": 4}})")),
      HasSubstr("quantization {\"bits\":4,\"group_size\":64} unsupported: quantised weights "
                "(method not named of 4 bits)"));
  EXPECT_THAT(Reason(LoadWith(Llama(), R"({"quantization_config": "fp8"})")),
              HasSubstr("quantization_config \"fp8\" unsupported"));
  json config = Llama();
  config["quantization_config"] = json::object();
  EXPECT_THAT(IgnoredKeys(Load(config)), Contains("quantization_config"));
}

}  // namespace
}  // namespace prefilld::model
