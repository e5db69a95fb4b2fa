#include "tests/model/config_files.h"

#include "tests/model/temporary_folder.h"

namespace prefilld::model {

using nlohmann::json;

json Llama() {
  return json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05, "hidden_act": "silu", "attention_bias": false, "mlp_bias": false,
    "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
    "initializer_range": 0.02, "pretraining_tp": 1, "tie_word_embeddings": false,
    "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": true,
    "rope_theta": 500000.0,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"}})");
}

json Qwen2() {
  return json::parse(R"({
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152064,
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06, "hidden_act": "silu", "rope_theta": 1000000.0,
    "eos_token_id": 151645, "sliding_window": 131072, "use_sliding_window": false,
    "max_window_layers": 28, "use_mrope": false, "tie_word_embeddings": false})");
}

json Mistral() {
  return json::parse(R"({
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32768,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05, "hidden_act": "silu", "rope_theta": 1000000.0,
    "eos_token_id": 2, "sliding_window": null, "tie_word_embeddings": false})");
}

absl::StatusOr<ModelConfig> LoadText(const std::string& text,
                                     const std::vector<std::string>& overruled_keys) {
  TemporaryFolder folder;
  folder.Write("config.json", text);
  return LoadModelConfig(folder.path(), overruled_keys);
}

absl::StatusOr<ModelConfig> Load(const json& config) { return LoadText(config.dump()); }

absl::StatusOr<ModelConfig> LoadWith(json config, const char* patch,
                                     const std::vector<std::string>& overruled_keys) {
  config.merge_patch(json::parse(patch));
  return LoadText(config.dump(), overruled_keys);
}

std::string Reason(const absl::StatusOr<ModelConfig>& refused) {
  return std::string(refused.status().message());
}

}  // namespace prefilld::model
