// Parses JSON as checkpoint files may use it: strict syntax, bounded size and depth, and no key
// twice in one object, because readers would disagree about which one counts.
#ifndef PREFILLD_MODEL_CHECKPOINT_STRICT_JSON_H_
#define PREFILLD_MODEL_CHECKPOINT_STRICT_JSON_H_

#include <cstddef>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace prefilld::model {

inline constexpr int kMaxJsonDepth = 16;

// Parses a text. INVALID_ARGUMENT says what is wrong and at which byte.
absl::StatusOr<nlohmann::json> ParseStrictJson(absl::string_view text,
                                               int max_depth = kMaxJsonDepth);

// Reads and parses a whole file. NOT_FOUND when there is none; INVALID_ARGUMENT when it is larger
// than max_bytes or not a JSON object. Messages begin with the path.
absl::StatusOr<nlohmann::json> ReadJsonObject(const std::string& path, size_t max_bytes);

// Returns a number without a fraction that fits, in whichever form it is written: 2048 or 2048.0.
std::optional<int64_t> WholeNumber(const nlohmann::json& value);

// Formats a value for a message: JSON on one line, cut when long.
std::string Shown(const nlohmann::json& value);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CHECKPOINT_STRICT_JSON_H_
