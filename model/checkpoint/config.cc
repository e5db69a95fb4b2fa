#include "model/checkpoint/config.h"

#include <algorithm>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "model/checkpoint/config_fields.h"
#include "model/checkpoint/ignored.h"
#include "model/checkpoint/refused.h"
#include "model/checkpoint/rope_config.h"
#include "model/checkpoint/strict_json.h"
#include "proto/status_macros.h"

namespace prefilld::model {
namespace {

using nlohmann::json;

constexpr size_t kMaxConfigBytes = size_t{4} << 20;
// No model of these families comes near these limits, and no product of two of them overflows.
constexpr int64_t kMaxVocabSize = int64_t{1} << 24;
constexpr int64_t kMaxWidth = int64_t{1} << 20;  // hidden and intermediate
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxHeads = 1024;
constexpr size_t kMaxEosIds = 1024;

constexpr int kHeadDims[] = {64, 128};
constexpr int64_t kWidthMultiple = 8;  // kernels move 16 bytes at a time

struct FamilyTraits {
  Family family;
  absl::string_view model_type;
  absl::string_view architecture;
  // These are transformers' defaults for fields that the file omits. 0: derived from other fields.
  int64_t default_num_kv_heads;
  int64_t default_head_dim;
};

constexpr FamilyTraits kFamilies[] = {
    {Family::kLlama, "llama", "LlamaForCausalLM", 0, 0},
    {Family::kQwen2, "qwen2", "Qwen2ForCausalLM", 32, 0},
    {Family::kQwen3, "qwen3", "Qwen3ForCausalLM", 32, 128},
    {Family::kMistral, "mistral", "MistralForCausalLM", 8, 0},
};

absl::StatusOr<FamilyTraits> ReadFamily(ConfigFields& fields) {
  const std::string model_type = fields.Text("model_type", "");
  const auto* traits = std::find_if(std::begin(kFamilies), std::end(kFamilies),
                                    [&](const auto& f) { return f.model_type == model_type; });
  if (traits == std::end(kFamilies)) {
    fields.Refuse("model_type", "unsupported; built for llama, qwen2, qwen3, mistral");
    return fields.Finish();
  }
  const json* architectures = fields.Value("architectures");
  if (architectures != nullptr && *architectures != json::array({traits->architecture})) {
    fields.Refuse("architectures", absl::StrCat("unsupported; built for ", traits->architecture));
  }
  return *traits;
}

void ReadShape(const FamilyTraits& traits, ConfigFields& fields, ModelConfig& config) {
  config.vocab_size = fields.Integer("vocab_size", 1, kMaxVocabSize);
  config.hidden = fields.Integer("hidden_size", 1, kMaxWidth);
  config.intermediate = fields.Integer("intermediate_size", 1, kMaxWidth);
  config.num_layers = static_cast<int>(fields.Integer("num_hidden_layers", 1, kMaxLayers));
  config.num_heads = static_cast<int>(fields.Integer("num_attention_heads", 1, kMaxHeads));
  const int64_t default_kv_heads =
      traits.default_num_kv_heads ? traits.default_num_kv_heads : config.num_heads;
  config.num_kv_heads =
      static_cast<int>(fields.Integer("num_key_value_heads", 1, kMaxHeads, default_kv_heads));
  int64_t default_head_dim = traits.default_head_dim;
  if (default_head_dim == 0) {
    default_head_dim = config.hidden / config.num_heads;
    if (!fields.Has("head_dim") && config.hidden % config.num_heads != 0) {
      fields.Refuse("hidden_size",
                    absl::StrCat("is not a multiple of num_attention_heads ", config.num_heads));
    }
  }
  const int64_t head_dim = fields.Integer("head_dim", 1, kMaxWidth, default_head_dim);
  config.head_dim = static_cast<int>(head_dim);
  config.max_positions = fields.Integer("max_position_embeddings", 1, kMaxPositions);
  config.rms_norm_epsilon = fields.Number("rms_norm_eps", 0.0, 1.0, 1e-6);

  const std::string multiple = absl::StrCat("unsupported; must be a multiple of ", kWidthMultiple);
  if (config.hidden % kWidthMultiple != 0) fields.Refuse("hidden_size", multiple);
  if (config.intermediate % kWidthMultiple != 0) fields.Refuse("intermediate_size", multiple);
  if (config.num_heads % config.num_kv_heads != 0) {
    fields.Fail(absl::InvalidArgumentError(
        absl::StrCat("num_attention_heads ", config.num_heads,
                     " is not a multiple of num_key_value_heads ", config.num_kv_heads)));
  }
  if (std::find(std::begin(kHeadDims), std::end(kHeadDims), head_dim) == std::end(kHeadDims)) {
    fields.Fail(absl::InvalidArgumentError(absl::StrCat(
        "head_dim ", head_dim, " unsupported; built for ", absl::StrJoin(kHeadDims, ", "))));
  }
}

// Reads which projections have biases, and whether q and k are normalised.
void ReadProjections(Family family, ConfigFields& fields, ModelConfig& config) {
  switch (family) {
    case Family::kLlama:
      config.qkv_bias = config.output_bias = fields.Flag("attention_bias", false);
      break;
    case Family::kQwen3:
      config.qkv_bias = config.output_bias = fields.Flag("attention_bias", false);
      config.qk_norm = true;
      break;
    case Family::kQwen2:
      config.qkv_bias = true;
      if (!fields.Flag("attention_bias", true)) {
        fields.Refuse("attention_bias", "unsupported for qwen2, which has q, k and v biases");
      }
      break;
    case Family::kMistral:
      if (fields.Flag("attention_bias", false)) {
        fields.Refuse("attention_bias", "unsupported for mistral");
      }
      break;
  }
  if (fields.Flag("mlp_bias", false)) fields.Refuse("mlp_bias", "unsupported");
  // Embedding models switch the mask off. An absent field means true, unlike most flags.
  if (!fields.Flag("is_causal", true)) {
    fields.Refuse("is_causal", "unsupported; built for causal attention");
  }
  const std::string activation = fields.Text("hidden_act", "silu");
  if (activation != "silu") fields.Refuse("hidden_act", "unsupported; built for silu");
  config.tied_embeddings = fields.Flag("tie_word_embeddings", false);
}

// Dual chunk attention keeps the rotation of long prompts within the lengths that were trained. A
// prompt of one chunk is attended to as usual. Longer prompts are not supported.
void LimitToOneChunk(ConfigFields& outer, ModelConfig& config) {
  constexpr char kName[] = "dual_chunk_attention_config";
  const json* object = outer.Value(kName);
  if (object == nullptr) return;
  if (!object->is_object()) {
    outer.Refuse(kName, "is not an object");
    return;
  }
  if (config.rope.kind != RopeKind::kDefault) {
    outer.Refuse(kName, "unsupported beside a scaled RoPE");
    return;
  }
  ConfigFields fields(*object, absl::StrCat(kName, "."));
  const int64_t local_size = fields.Integer("local_size", 0, kMaxPositions);
  const int64_t chunk_size = fields.Integer("chunk_size", local_size + 1, kMaxPositions + 1);
  // Beyond this length logits are scaled as well; 0 means never.
  const int64_t original = fields.Integer("original_max_position_embeddings", 0, kMaxPositions, 0);
  const int64_t unscaled = original == 0 ? kMaxPositions : original;
  config.max_positions = std::min({config.max_positions, chunk_size - local_size, unscaled});
  outer.Fail(fields.Finish());
}

// Reads one id or a list of ids, and adds those that are new to `ids`.
void ReadEosIds(ConfigFields& fields, std::vector<uint32_t>& ids) {
  const json* value = fields.Value("eos_token_id");
  if (value == nullptr) return;
  const json list = value->is_array() ? *value : json::array({*value});
  if (list.size() > kMaxEosIds) {
    fields.Refuse("eos_token_id", absl::StrCat("has more than ", kMaxEosIds, " ids"));
    return;
  }
  for (const json& id : list) {
    const std::optional<int64_t> number = WholeNumber(id);
    if (!number || *number > int64_t{UINT32_MAX}) {
      fields.Refuse("eos_token_id", "is not a token id or a list of them");
      return;
    }
    if (*number < 0) {  // no token has such an id, and -1 is a way to say that none ends the text
      fields.NoteIgnored(absl::StrCat("eos_token_id ", *number));
      continue;
    }
    const auto token = static_cast<uint32_t>(*number);
    if (std::find(ids.begin(), ids.end(), token) == ids.end()) ids.push_back(token);
  }
}

// Takes the keys that the operator overrules out of a config.json: null counts as absent. "a.b" is
// the member b of the object a.
absl::Status Overrule(const std::vector<std::string>& keys, json& object) {
  for (const std::string& key : keys) {
    json* value = object.contains(key) ? &object[key] : nullptr;
    const size_t dot = key.find('.');
    if (value == nullptr && dot != std::string::npos) {
      const auto outer = object.find(key.substr(0, dot));
      const std::string member = key.substr(dot + 1);
      if (outer != object.end() && outer->is_object() && outer->contains(member)) {
        value = &(*outer)[member];
      }
    }
    if (value == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("has no ", key, ", which --ignore_config names"));
    }
    *value = nullptr;
  }
  return absl::OkStatus();
}

absl::StatusOr<ModelConfig> ReadConfig(const json& object) {
  ConfigFields fields(object);
  PREFILLD_ASSIGN_OR_RETURN(const FamilyTraits traits, ReadFamily(fields));
  RefuseQuantization(fields);
  ModelConfig config;
  config.family = traits.family;
  ReadShape(traits, fields, config);
  ReadProjections(traits.family, fields, config);
  if (fields.Number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0) {
    fields.Refuse("partial_rotary_factor", "unsupported; built for 1");
  }
  config.rope = ReadRopeConfig(fields, config.max_positions);
  LimitToOneChunk(fields, config);
  RequireFullAttention(fields, config);
  ReadEosIds(fields, config.eos_token_ids);
  config.byte_tokens = fields.Flag("byte_tokens", false);
  IgnoreInertFields(fields);
  PREFILLD_RETURN_IF_ERROR(fields.Finish());
  config.ignored_keys = fields.ignored();
  return config;
}

absl::Status Within(const std::string& path, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
}

}  // namespace

absl::StatusOr<ModelConfig> LoadModelConfig(const std::string& checkpoint_dir,
                                            const std::vector<std::string>& overruled_keys) {
  const std::string path = absl::StrCat(checkpoint_dir, "/config.json");
  PREFILLD_ASSIGN_OR_RETURN(json object, ReadJsonObject(path, kMaxConfigBytes));
  if (const absl::Status status = Overrule(overruled_keys, object); !status.ok()) {
    return absl::Status(status.code(), absl::StrCat(path, " ", status.message()));
  }
  absl::StatusOr<ModelConfig> config = ReadConfig(object);
  if (!config.ok()) return Within(path, config.status());

  // Only the end-of-sequence ids of this file are used. The file may be absent.
  const std::string generation_path = absl::StrCat(checkpoint_dir, "/generation_config.json");
  absl::StatusOr<json> generation = ReadJsonObject(generation_path, kMaxConfigBytes);
  if (absl::IsNotFound(generation.status())) return config;
  PREFILLD_RETURN_IF_ERROR(generation.status());
  ConfigFields fields(*generation);
  ReadEosIds(fields, config->eos_token_ids);
  if (!fields.status().ok()) return Within(generation_path, fields.status());
  return config;
}

}  // namespace prefilld::model
