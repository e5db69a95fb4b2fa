#include "model/checkpoint/rope_config.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "absl/strings/str_cat.h"
#include "model/checkpoint/ignored.h"
#include "model/checkpoint/strict_json.h"

namespace prefilld::model {
namespace {

using nlohmann::json;

constexpr double kDefaultTheta = 10000.0;
// Bases near 1 make YaRN's logarithm vanish. Real bases are 10^4 to 10^8.
constexpr double kMinTheta = 2.0;
constexpr double kMaxTheta = 1e12;
constexpr double kMaxFactor = 1e4;
constexpr double kMaxBand = 1e6;  // of wavelength limits and rotation counts
constexpr double kSmallestPositive = 1e-6;

std::optional<RopeKind> ParseKind(const std::string& name) {
  if (name == "default") return RopeKind::kDefault;
  if (name == "linear") return RopeKind::kLinear;
  if (name == "dynamic") return RopeKind::kDynamicNtk;
  if (name == "llama3") return RopeKind::kLlama3;
  if (name == "yarn") return RopeKind::kYarn;
  return std::nullopt;
}

// Reads "rope_type", or "type" as older files call it. Files that several versions wrote have both.
RopeKind ReadKind(ConfigFields& fields) {
  const std::string type = fields.Text("type", "");
  const std::string kind_name = fields.Text("rope_type", type.empty() ? "default" : type);
  if (!type.empty() && type != kind_name) {
    fields.Refuse("type", absl::StrCat("contradicts rope_type ", kind_name));
  }
  const std::optional<RopeKind> kind = ParseKind(kind_name);
  if (!kind) {
    fields.Refuse(fields.Has("rope_type") ? "rope_type" : "type",
                  "unsupported; built for default, linear, dynamic, llama3, yarn");
  }
  return kind.value_or(RopeKind::kDefault);
}

// YaRN takes 0 for "not given".
double NonZero(double value, double otherwise) { return value == 0.0 ? otherwise : value; }

void ReadYarn(ConfigFields& fields, int64_t max_positions, RopeConfig& rope) {
  const double stretch =
      static_cast<double>(max_positions) / static_cast<double>(rope.original_max_positions);
  rope.factor =
      fields.Has("factor") ? fields.Number("factor", 1.0, kMaxFactor) : std::max(stretch, 1.0);
  fields.Value("factor");  // is known, even where it is null
  rope.beta_fast = NonZero(fields.Number("beta_fast", 0.0, kMaxBand, 0.0), 32.0);
  rope.beta_slow = NonZero(fields.Number("beta_slow", 0.0, kMaxBand, 0.0), 1.0);
  if (rope.beta_fast < rope.beta_slow) {
    fields.Refuse("beta_fast", absl::StrCat("is below beta_slow ", rope.beta_slow));
  }
  rope.mscale = fields.Number("mscale", 0.0, kMaxBand, 0.0);
  rope.mscale_all_dim = fields.Number("mscale_all_dim", 0.0, kMaxBand, 0.0);
  if (fields.Has("attention_factor")) {
    rope.attention_factor = fields.Number("attention_factor", kSmallestPositive, kMaxFactor);
  }
  fields.Value("attention_factor");  // is known, even where it is null
  rope.truncate = fields.Flag("truncate", true);
}

void ReadLlama3(ConfigFields& fields, RopeConfig& rope) {
  rope.factor = fields.Number("factor", 1.0, kMaxFactor);
  rope.low_freq_factor = fields.Number("low_freq_factor", kSmallestPositive, kMaxBand);
  rope.high_freq_factor = fields.Number("high_freq_factor", kSmallestPositive, kMaxBand);
  if (rope.high_freq_factor <= rope.low_freq_factor) {
    fields.Refuse("high_freq_factor",
                  absl::StrCat("is not above low_freq_factor ", rope.low_freq_factor));
  }
}

// Reads the original length: from inside the RoPE object, from beside it as in Phi-style files, or
// else the model's maximum.
int64_t ReadOriginalPositions(ConfigFields& outer, ConfigFields& rope, int64_t max_positions) {
  const int64_t beside =
      outer.Integer("original_max_position_embeddings", 1, kMaxPositions, max_positions);
  const int64_t inside = rope.Integer("original_max_position_embeddings", 1, kMaxPositions, beside);
  if (outer.Has("original_max_position_embeddings") && inside != beside) {
    rope.Refuse("original_max_position_embeddings",
                absl::StrCat("contradicts original_max_position_embeddings ", beside,
                             " beside the RoPE object"));
  }
  return inside;
}

RopeConfig ReadRopeObject(ConfigFields& outer, ConfigFields& fields, int64_t max_positions) {
  RopeConfig rope;
  const double theta_beside = outer.Number("rope_theta", kMinTheta, kMaxTheta, kDefaultTheta);
  rope.theta = fields.Number("rope_theta", kMinTheta, kMaxTheta, theta_beside);
  if (outer.Has("rope_theta") && rope.theta != theta_beside) {
    fields.Refuse("rope_theta",
                  absl::StrCat("contradicts rope_theta ", theta_beside, " beside the RoPE object"));
  }
  if (fields.Number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0) {
    fields.Refuse("partial_rotary_factor", "unsupported; built for 1");
  }
  rope.kind = ReadKind(fields);
  rope.original_max_positions = ReadOriginalPositions(outer, fields, max_positions);
  switch (rope.kind) {
    case RopeKind::kDefault:
      rope.original_max_positions = 0;
      break;
    case RopeKind::kLinear:
      rope.original_max_positions = 0;
      rope.factor = fields.Number("factor", 1.0, kMaxFactor);
      break;
    case RopeKind::kDynamicNtk:
      rope.factor = fields.Number("factor", 1.0, kMaxFactor);
      // transformers stretches past max_position_embeddings, whatever this field says.
      if (rope.original_max_positions != max_positions) {
        fields.Refuse("original_max_position_embeddings",
                      absl::StrCat("unsupported for dynamic unless it is max_position_embeddings ",
                                   max_positions));
      }
      break;
    case RopeKind::kLlama3:
      ReadLlama3(fields, rope);
      break;
    case RopeKind::kYarn:
      ReadYarn(fields, max_positions, rope);
      break;
  }
  return rope;
}

}  // namespace

RopeConfig ReadRopeConfig(ConfigFields& outer, int64_t max_positions) {
  const json* scaling = outer.Value("rope_scaling");
  const json* parameters = outer.Value("rope_parameters");
  if (scaling != nullptr && parameters != nullptr && *scaling != *parameters) {
    outer.Refuse("rope_scaling", absl::StrCat("contradicts rope_parameters ", Shown(*parameters)));
  }
  const char* const name = scaling != nullptr ? "rope_scaling" : "rope_parameters";
  static const json kNone = json::object();
  const json* object = scaling != nullptr ? scaling : parameters;
  if (object == nullptr) object = &kNone;
  if (!object->is_object()) {
    outer.Refuse(name, "is not an object");
    return {};
  }
  ConfigFields fields(*object, absl::StrCat(name, "."));
  RopeConfig rope = ReadRopeObject(outer, fields, max_positions);
  IgnoreInertRopeFields(fields);
  outer.Fail(fields.Finish());
  for (const std::string& key : fields.ignored()) outer.NoteIgnored(key);
  return rope;
}

}  // namespace prefilld::model
