#include "model/checkpoint/quantization_config.h"

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "absl/strings/str_cat.h"
#include "model/checkpoint/strict_json.h"

namespace prefilld::model {
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
