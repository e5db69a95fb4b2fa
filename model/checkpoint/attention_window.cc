#include "model/checkpoint/attention_window.h"

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "absl/strings/str_cat.h"

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

}  // namespace prefilld::model
