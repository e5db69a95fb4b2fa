#include "model/sparse/attention_options.h"

#include <type_traits>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace prefilld::model {
namespace {

template <typename Members>
absl::Status CheckLimits(const char* name, const Members& members,
                         const AttentionOptions& options) {
  const std::optional<typename Members::Value> value = options.*members.option;
  if (!value.has_value() || members.Contains(*value)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("attention.", name, " ", *value, " is outside ", members.LimitsText()));
}

}  // namespace

std::string ThresholdHelp(const AttentionThreshold& threshold) {
  const std::string limits =
      std::visit([](const auto& members) { return members.LimitsText(); }, threshold.members);
  const std::string built_in = std::visit(
      [](auto value) {
        if constexpr (std::is_same_v<decltype(value), bool>)
          return std::string(value ? "true" : "false");
        return absl::StrCat(value);
      },
      ValueOf(threshold, AttentionOptions()));
  // This one is measured at start, so the member's initial value is nobody's default.
  const bool is_measured = absl::string_view(threshold.name) == "crossover_tokens";
  return absl::StrCat(threshold.help, limits.empty() ? "" : " In ", limits,
                      limits.empty() ? "" : ".",
                      is_measured ? "" : absl::StrCat(" Built in: ", built_in, "."));
}

ThresholdValue ValueOf(const AttentionThreshold& threshold, const AttentionOptions& options) {
  const auto value = [&options](const auto& members) -> ThresholdValue {
    using T = typename std::decay_t<decltype(members)>::Value;
    const std::optional<T> kept = options.*members.option;
    if constexpr (std::is_same_v<T, float>) {
      // vertical_slash_gamma is the only one that may be absent.
      return kept.value_or(options.gamma);
    } else {
      return *kept;
    }
  };
  return std::visit(value, threshold.members);
}

absl::Status Validate(const AttentionOptions& options) {
  if (!IsValid(options.policy)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "attention.policy ", static_cast<int>(options.policy), " is none of ", AllPolicyNames()));
  }
  for (const AttentionThreshold& threshold : kAttentionThresholds) {
    PREFILLD_RETURN_IF_ERROR(std::visit(
        [&](const auto& members) { return CheckLimits(threshold.name, members, options); },
        threshold.members));
  }
  if (options.score_stride != 8 && options.score_stride != 16) {
    return absl::InvalidArgumentError(
        absl::StrCat("attention.score_stride ", options.score_stride, " is none of 8, 16"));
  }
  return absl::OkStatus();
}

AttentionOptions Apply(const AttentionOverrides& overrides, AttentionOptions options) {
  if (overrides.policy.has_value()) options.policy = *overrides.policy;
  if (overrides.gamma.has_value()) options.vertical_slash_gamma.reset();
  for (const AttentionThreshold& threshold : kAttentionThresholds) {
    std::visit(
        [&](const auto& members) {
          if (const auto& named = overrides.*members.named) options.*members.option = *named;
        },
        threshold.members);
  }
  return options;
}

AttentionPolicy ResolvePolicy(const AttentionOptions& options, int64_t num_tokens,
                              int block_tokens) {
  if (num_tokens <= 2 * block_tokens) return AttentionPolicy::kDense;
  if (options.policy != AttentionPolicy::kAuto) return options.policy;
  return num_tokens >= options.crossover_tokens ? AttentionPolicy::kShare : AttentionPolicy::kDense;
}

}  // namespace prefilld::model
