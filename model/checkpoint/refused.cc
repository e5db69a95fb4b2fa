#include "model/checkpoint/refused.h"

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "absl/strings/str_cat.h"
#include "model/checkpoint/strict_json.h"

namespace prefilld::model {
namespace {

using nlohmann::json;

constexpr int64_t kNoWindow = INT64_MAX;
// transformers' values for fields that a file does not mention.
constexpr int64_t kDefaultWindow = 4096;
constexpr int64_t kDefaultFirstWindowed = 28;

// Reads `layer_types`, and returns how many layers it gives a window; nullopt when it is absent.
std::optional<int64_t> ReadLayerTypes(ConfigFields& fields, int num_layers) {
  const json* types = fields.Value("layer_types");
  if (types == nullptr) return std::nullopt;
  const auto known = [](const json& type) {
    return type == "full_attention" || type == "sliding_attention";
  };
  if (!types->is_array() || types->size() != static_cast<size_t>(num_layers) ||
      !std::all_of(types->begin(), types->end(), known)) {
    fields.Refuse("layer_types", absl::StrCat("unsupported; built for \"full_attention\" in all ",
                                              num_layers, " layers"));
    return 0;
  }
  return std::count(types->begin(), types->end(), "sliding_attention");
}

// Qwen gives the window to the layers from max_window_layers on, unless layer_types says to which.
int64_t CountQwenWindows(ConfigFields& fields, int num_layers, std::optional<int64_t> named) {
  const int64_t first = fields.Integer("max_window_layers", 0, INT64_MAX, kDefaultFirstWindowed);
  if (!fields.Flag("use_sliding_window", false)) return named.value_or(0);
  return named.value_or(std::max<int64_t>(0, num_layers - first));
}

int64_t CountWindows(ConfigFields& fields, const ModelConfig& config) {
  const std::optional<int64_t> named = ReadLayerTypes(fields, config.num_layers);
  switch (config.family) {
    case Family::kLlama:  // has no windows, and leaves these fields unread
      fields.Ignore({"max_window_layers", "use_sliding_window"});
      return named.value_or(0);
    case Family::kMistral:  // has the same window in all layers
      fields.Ignore({"max_window_layers", "use_sliding_window"});
      return config.num_layers;
    case Family::kQwen2:
    case Family::kQwen3:
      return CountQwenWindows(fields, config.num_layers, named);
  }
  return config.num_layers;
}

}  // namespace

void RequireFullAttention(ConfigFields& fields, const ModelConfig& config) {
  const int64_t num_windows = CountWindows(fields, config);
  if (num_windows == 0) {
    fields.Ignore({"sliding_window"});
    return;
  }
  const bool assumed = config.family != Family::kLlama && !fields.Mentions("sliding_window");
  const int64_t window =
      fields.Integer("sliding_window", 0, INT64_MAX, assumed ? kDefaultWindow : kNoWindow);
  const int64_t longest = PositionLimit(config);
  if (window >= longest) return;
  const std::string models = config.family == Family::kMistral ? "mistral" : "qwen";
  fields.Refuse("sliding_window",
                absl::StrCat("unsupported below the model's ", longest, " positions: ", num_windows,
                             " of ", config.num_layers, " layers use it",
                             assumed ? "; absent means 4096 to " + models : ""));
}

namespace {

using nlohmann::json;

// transformers writes the first, compressed-tensors used to write the second, MLX writes the third.
constexpr const char* kFields[] = {"quantization_config", "compression_config", "quantization"};

const json* Member(const json& object, const char* name) {
  const auto found = object.find(name);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

std::string Method(const json& object) {
  const json* method = Member(object, "quant_method");
  if (method == nullptr || !method->is_string()) return "method not named";
  return absl::StrCat("method ", Shown(*method));
}

// Returns the bits of a weight as GPTQ, AWQ, MLX or bitsandbytes call them.
std::string Bits(const json& object) {
  for (const char* name : {"bits", "w_bit"}) {
    const json* bits = Member(object, name);
    const std::optional<int64_t> number = bits ? WholeNumber(*bits) : std::nullopt;
    if (number) return absl::StrCat(" of ", *number, " bits");
  }
  for (const auto& [name, bits] : {std::pair("load_in_4bit", 4), std::pair("load_in_8bit", 8)}) {
    const json* flag = Member(object, name);
    if (flag != nullptr && *flag == true) return absl::StrCat(" of ", bits, " bits");
  }
  return "";
}

}  // namespace

void RefuseQuantization(ConfigFields& fields) {
  for (const char* name : kFields) {
    const json* value = fields.Value(name);
    if (value == nullptr) continue;
    const bool is_object = value->is_object();
    if (is_object && value->empty()) {
      fields.NoteIgnored(name);
      continue;
    }
    const std::string what = is_object ? absl::StrCat(Method(*value), Bits(*value)) : "no object";
    fields.Refuse(name,
                  absl::StrCat("unsupported: quantised weights (", what, "); ", kUseUnquantized,
                               ", or, if these files are that already, --ignore_config=", name));
  }
}

}  // namespace prefilld::model
