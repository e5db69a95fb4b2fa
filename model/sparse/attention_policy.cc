#include "model/sparse/attention_policy.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace prefilld::model {
namespace {

// Written so that NaN fails.
absl::Status CheckRange(const char* field, float value, float lowest, float highest,
                        bool lowest_allowed) {
  const bool above = lowest_allowed ? value >= lowest : value > lowest;
  if (above && value <= highest) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("attention.", field, " ", value, " is outside ",
                                                 lowest_allowed ? "[" : "(", lowest, ", ", highest,
                                                 "]"));
}

absl::Status CheckNotNegative(const char* field, int64_t value) {
  if (value >= 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("attention.", field, " ", value, " is negative"));
}

template <typename T>
void Override(const std::optional<T>& asked, T& value) {
  if (asked) value = *asked;
}

}  // namespace

const char* Name(AttentionPolicy policy) {
  switch (policy) {
    case AttentionPolicy::kDense:
      return "dense";
    case AttentionPolicy::kVerticalSlash:
      return "vertical_slash";
    case AttentionPolicy::kShare:
      return "share";
    case AttentionPolicy::kBaselineQueryAware:
      return "baseline_query_aware";
    case AttentionPolicy::kBaselineRandom:
      return "baseline_random";
    case AttentionPolicy::kAuto:
      return "auto";
  }
  return "?";
}

bool IsBaseline(AttentionPolicy policy) {
  return policy == AttentionPolicy::kBaselineQueryAware ||
         policy == AttentionPolicy::kBaselineRandom;
}

absl::Status Validate(const AttentionOptions& options) {
  if (options.policy > AttentionPolicy::kAuto) {
    std::string names;
    for (const AttentionPolicy policy : kAttentionPolicies) {
      absl::StrAppend(&names, names.empty() ? "" : ", ", Name(policy));
    }
    return absl::InvalidArgumentError(
        absl::StrCat("attention.policy ", static_cast<int>(options.policy), " is none of ", names));
  }
  absl::Status status = CheckRange("gamma", options.gamma, 0.0f, 1.0f, /*lowest_allowed=*/false);
  if (options.vertical_slash_gamma) {
    status.Update(CheckRange("vertical_slash_gamma", *options.vertical_slash_gamma, 0.0f, 1.0f,
                             /*lowest_allowed=*/false));
  }
  status.Update(CheckRange("tau", options.tau, 0.0f, 1.0f, true));
  status.Update(CheckRange("delta", options.delta, 0.0f, 1.0f, true));
  status.Update(CheckRange("coverage", options.coverage, 0.0f, 1.0f, true));
  status.Update(CheckRange("density", options.density, 0.0f, 1.0f, /*lowest_allowed=*/false));
  status.Update(CheckNotNegative("min_budget_tokens", options.min_budget_tokens));
  status.Update(CheckNotNegative("crossover_tokens", options.crossover_tokens));
  status.Update(CheckNotNegative("recall_audit_rows", options.recall_audit_rows));
  return status;
}

AttentionOptions Apply(const AttentionOverrides& overrides, AttentionOptions options) {
  Override(overrides.policy, options.policy);
  if (overrides.gamma) {
    options.gamma = *overrides.gamma;
    options.vertical_slash_gamma.reset();
  }
  if (overrides.vertical_slash_gamma) {
    options.vertical_slash_gamma = overrides.vertical_slash_gamma;
  }
  Override(overrides.tau, options.tau);
  Override(overrides.delta, options.delta);
  Override(overrides.coverage, options.coverage);
  Override(overrides.min_budget_tokens, options.min_budget_tokens);
  Override(overrides.same_layer_sharing, options.same_layer_sharing);
  Override(overrides.crossover_tokens, options.crossover_tokens);
  return options;
}

AttentionPolicy ResolvePolicy(const AttentionOptions& options, int64_t num_tokens, int block_tokens,
                              bool has_clusters) {
  if (num_tokens <= 2 * block_tokens) return AttentionPolicy::kDense;
  if (options.policy != AttentionPolicy::kAuto) return options.policy;
  const bool long_enough = num_tokens >= options.crossover_tokens;
  return long_enough && has_clusters ? AttentionPolicy::kShare : AttentionPolicy::kDense;
}

}  // namespace prefilld::model
