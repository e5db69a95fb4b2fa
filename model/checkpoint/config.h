// The configuration of a decoder-only transformer, read from a Hugging Face config.json.
#ifndef PREFILLD_MODEL_CHECKPOINT_CONFIG_H_
#define PREFILLD_MODEL_CHECKPOINT_CONFIG_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/dtype.h"

namespace prefilld::model {

enum class Family : uint8_t { kLlama, kQwen2, kQwen3, kMistral };

enum class RopeKind : uint8_t { kDefault, kLinear, kDynamicNtk, kLlama3, kYarn };

// Rotary position embedding: the fields of `rope_theta` / `rope_scaling` / `rope_parameters`.
// `kind` determines which of them are used.
struct RopeConfig {
  RopeKind kind = RopeKind::kDefault;
  double theta = 10000.0;
  double factor = 1.0;
  int64_t original_max_positions = 0;  // dynamic NTK, llama3, YaRN
  double low_freq_factor = 1.0;        // llama3
  double high_freq_factor = 4.0;       // llama3
  double beta_fast = 32.0;             // YaRN
  double beta_slow = 1.0;              // YaRN
  double mscale = 0.0;                 // YaRN, 0: absent
  double mscale_all_dim = 0.0;         // YaRN, 0: absent
  double attention_factor = 0.0;       // YaRN, 0: absent, derived from factor
  bool truncate = true;                // YaRN
};

struct ModelConfig {
  Family family = Family::kLlama;
  int64_t vocab_size = 0;
  int64_t hidden = 0;
  int64_t intermediate = 0;
  int num_layers = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int64_t max_positions = 0;  // with dual chunk attention the length of one chunk
  double rms_norm_epsilon = 1e-6;
  bool qkv_bias = false;
  bool output_bias = false;  // bias of the attention output projection (Llama attention_bias)
  bool qk_norm = false;
  bool tied_embeddings = false;
  // Tokens 0 to 255 are bytes, so that no tokenizer is needed: "byte_tokens" of config.json, a
  // field of ours that the embedded model has.
  bool byte_tokens = false;
  RopeConfig rope;
  std::vector<uint32_t> eos_token_ids;  // config.json, completed by generation_config.json
  // Fields of config.json that were left out of account because they cannot change the result.
  std::vector<std::string> ignored_keys;
};

// Loads the configuration. INVALID_ARGUMENT names the field, its value and what is supported. An
// unsupported field is never ignored (other activations, other head_dim, ...), nor is an unknown
// one unless it is empty. `overruled_keys` names fields to treat as absent all the same, those of a
// nested object as "rope_scaling.finetuned"; one that is not in the file is INVALID_ARGUMENT.
absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& checkpoint_dir,
                                            const std::vector<std::string>& overruled_keys = {});

// Returns the longest prompt that the model's rotation is made for. Beyond it the answers are
// noise.
int64_t PositionLimit(const ModelConfig& config);

// The rotation of a prompt of `num_tokens`: [head_dim / 2] inverse frequencies in radians per
// position, and the factor on cos and sin. The length matters only to dynamic NTK, which stretches
// the base for prompts past the original length.
struct RopeTable {
  std::vector<float> inv_freq;
  float attention_factor = 1.0f;
};
RopeTable MakeRopeTable(const ModelConfig& config, int64_t num_tokens);
// Tells whether a prompt of `num_tokens` has the same table as every shorter one.
bool HasCommonRopeTable(const ModelConfig& config, int64_t num_tokens);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CHECKPOINT_CONFIG_H_
