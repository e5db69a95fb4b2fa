#include "tests/model/random_checkpoint.h"

#include <stdlib.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "nlohmann/json.hpp"

namespace prefilld::model {
namespace {

struct FamilyNames {
  const char* model_type;
  const char* architecture;
};

FamilyNames NamesOf(Family family) {
  switch (family) {
    case Family::kLlama:
      return {"llama", "LlamaForCausalLM"};
    case Family::kQwen2:
      return {"qwen2", "Qwen2ForCausalLM"};
    case Family::kQwen3:
      return {"qwen3", "Qwen3ForCausalLM"};
    case Family::kMistral:
      return {"mistral", "MistralForCausalLM"};
  }
  abort();
}

nlohmann::json ConfigJson(const ModelConfig& config) {
  const FamilyNames names = NamesOf(config.family);
  nlohmann::json json = {
      {"architectures", {names.architecture}},
      {"model_type", names.model_type},
      {"vocab_size", config.vocab_size},
      {"hidden_size", config.hidden},
      {"intermediate_size", config.intermediate},
      {"num_hidden_layers", config.num_layers},
      {"num_attention_heads", config.num_heads},
      {"num_key_value_heads", config.num_kv_heads},
      {"head_dim", config.head_dim},
      {"max_position_embeddings", config.max_positions},
      {"rms_norm_eps", config.rms_norm_epsilon},
      {"rope_theta", config.rope.theta},
      {"hidden_act", "silu"},
      {"tie_word_embeddings", config.tied_embeddings},
      {"torch_dtype", "bfloat16"},
      {"eos_token_id", config.eos_token_ids},
  };
  if (config.rope.kind == RopeKind::kDynamicNtk) {
    json["rope_scaling"] = {{"rope_type", "dynamic"}, {"factor", config.rope.factor}};
  }
  if (config.family == Family::kLlama || config.family == Family::kQwen3) {
    json["attention_bias"] = config.qkv_bias;
  }
  if (config.family == Family::kMistral) json["sliding_window"] = nullptr;
  return json;
}

// Collects tensors in memory, then writes one safetensors file.
class TensorFile {
 public:
  explicit TensorFile(uint64_t seed) : random_(seed) {}

  // Adds values uniform around `mean` with the given standard deviation. They come from the raw
  // generator, since the distributions of the standard library differ between implementations.
  void Add(const std::string& name, std::vector<int64_t> shape, double deviation, double mean = 0) {
    int64_t count = 1;
    for (int64_t extent : shape) count *= extent;
    const size_t begin = data_.size();
    data_.resize(begin + count * sizeof(uint16_t));
    for (int64_t i = 0; i < count; ++i) {
      const double unit = static_cast<double>(random_() >> 11) * 0x1p-53;
      const float value = static_cast<float>(mean + deviation * std::sqrt(12.0) * (unit - 0.5));
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      const uint16_t bf16 = static_cast<uint16_t>(bits >> 16);
      std::memcpy(&data_[begin + i * sizeof(bf16)], &bf16, sizeof(bf16));
    }
    header_[name] = {{"dtype", "BF16"}, {"shape", shape}, {"data_offsets", {begin, data_.size()}}};
  }

  std::string Serialize() const {
    std::string header = header_.dump();
    header.resize((header.size() + 7) / 8 * 8, ' ');
    const uint64_t header_bytes = header.size();
    std::string file(sizeof(header_bytes), '\0');
    std::memcpy(file.data(), &header_bytes, sizeof(header_bytes));
    return file + header + data_;
  }

 private:
  std::mt19937_64 random_;
  nlohmann::json header_ = nlohmann::json::object();
  std::string data_;
};

std::string SafetensorsOf(const ModelConfig& config, uint64_t seed) {
  constexpr double kAttentionSharpness = 2.0;  // of q and of k: logits deviate by about its square
  const int64_t hidden = config.hidden;
  const int64_t q_width = static_cast<int64_t>(config.num_heads) * config.head_dim;
  const int64_t kv_width = static_cast<int64_t>(config.num_kv_heads) * config.head_dim;
  const double from_hidden = 1.0 / std::sqrt(static_cast<double>(hidden));

  TensorFile file(seed);
  file.Add("model.embed_tokens.weight", {config.vocab_size, hidden}, 1.0);
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const std::string attention = prefix + "self_attn.";
    // Heads with q/k norm take their scale from the norm's weight alone.
    const double sharpness = config.qk_norm ? 1.0 : kAttentionSharpness;
    file.Add(prefix + "input_layernorm.weight", {hidden}, 0.1, 1.0);
    file.Add(attention + "q_proj.weight", {q_width, hidden}, sharpness * from_hidden);
    file.Add(attention + "k_proj.weight", {kv_width, hidden}, sharpness * from_hidden);
    file.Add(attention + "v_proj.weight", {kv_width, hidden}, from_hidden);
    if (config.qkv_bias) {
      file.Add(attention + "q_proj.bias", {q_width}, 0.3);
      file.Add(attention + "k_proj.bias", {kv_width}, 0.3);
      file.Add(attention + "v_proj.bias", {kv_width}, 0.3);
    }
    if (config.qk_norm) {
      file.Add(attention + "q_norm.weight", {config.head_dim}, 0.1, kAttentionSharpness);
      file.Add(attention + "k_norm.weight", {config.head_dim}, 0.1, kAttentionSharpness);
    }
    file.Add(attention + "o_proj.weight", {hidden, q_width}, 0.5 / std::sqrt(q_width));
    if (config.output_bias) file.Add(attention + "o_proj.bias", {hidden}, 0.1);
    file.Add(prefix + "post_attention_layernorm.weight", {hidden}, 0.1, 1.0);
    file.Add(prefix + "mlp.gate_proj.weight", {config.intermediate, hidden}, from_hidden);
    file.Add(prefix + "mlp.up_proj.weight", {config.intermediate, hidden}, from_hidden);
    file.Add(prefix + "mlp.down_proj.weight", {hidden, config.intermediate},
             0.5 / std::sqrt(config.intermediate));
  }
  file.Add("model.norm.weight", {hidden}, 0.1, 1.0);
  if (!config.tied_embeddings) {
    file.Add("lm_head.weight", {config.vocab_size, hidden}, 2.0 * from_hidden);
  }
  return file.Serialize();
}

[[noreturn]] void Fail(const std::string& what) {
  std::perror(what.c_str());
  abort();
}

}  // namespace

ModelConfig SmallRandomConfig() {
  ModelConfig config;
  config.family = Family::kLlama;
  config.vocab_size = 320;
  config.hidden = 128;
  config.intermediate = 192;
  config.num_layers = 4;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 64;
  config.max_positions = 4096;
  config.eos_token_ids = {319};
  return config;
}

RandomCheckpoint::RandomCheckpoint(const ModelConfig& config, uint64_t seed) : config_(config) {
  if (config.rope.kind != RopeKind::kDefault && config.rope.kind != RopeKind::kDynamicNtk) {
    Fail("RandomCheckpoint writes default RoPE and dynamic NTK alone");
  }
  std::string pattern = (std::filesystem::temp_directory_path() / "prefilld-XXXXXX").string();
  if (mkdtemp(pattern.data()) == nullptr) Fail(pattern);
  dir_ = pattern;
  WriteFile("config.json", ConfigJson(config).dump(2));
  WriteFile("model.safetensors", SafetensorsOf(config, seed));
}

RandomCheckpoint::~RandomCheckpoint() {
  std::error_code ignored;
  std::filesystem::remove_all(dir_, ignored);
}

void RandomCheckpoint::WriteFile(const std::string& name, const std::string& content) const {
  const std::string path = dir_ + "/" + name;
  std::ofstream file(path, std::ios::binary);
  file << content;
  file.close();
  if (!file) Fail(path);
}

std::string ClusterFile(const ModelConfig& config, bool alone) {
  std::vector<std::string> heads, clusters, names;
  for (int layer = 0; layer < config.num_layers; ++layer) {
    for (int head = 0; head < config.num_heads; ++head) {
      heads.push_back(absl::StrCat("[", layer, ",", head, "]"));
      names.push_back(absl::StrCat("\"", names.size(), "\""));
      clusters.push_back(absl::StrCat(names.back(), ": [", heads.back(), "]"));
    }
  }
  if (!alone) {
    names = {"\"all\""};
    clusters = {absl::StrCat("\"all\": [", absl::StrJoin(heads, ","), "]")};
  }
  return absl::StrCat("{\"clusters\": {", absl::StrJoin(clusters, ","), "}, \"shared_clusters\": [",
                      absl::StrJoin(names, ","), "]}");
}

}  // namespace prefilld::model
