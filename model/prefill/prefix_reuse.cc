#include "model/prefill/prefix_reuse.h"

#include <algorithm>
#include <iterator>

namespace prefilld::model {
namespace {

// The more of these, the more blocks are computed.
constexpr absl::string_view kMoreIsStricter[] = {"gamma", "vertical_slash_gamma", "score_threshold",
                                                 "last_rows_gamma", "min_budget_tokens"};
// These change no KV of share and vertical_slash: they choose the policy, are a baseline's, or only
// measure.
constexpr absl::string_view kWithoutEffect[] = {"crossover_tokens", "density", "recall_audit_rows"};

template <size_t n>
bool Contains(const absl::string_view (&names)[n], absl::string_view name) {
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

}  // namespace

const char* Name(PrefixReuseRule rule) {
  return rule == PrefixReuseRule::kLooser ? "looser" : "equal";
}

std::optional<PrefixReuseRule> ParsePrefixReuseRule(absl::string_view name) {
  for (const PrefixReuseRule rule : {PrefixReuseRule::kLooser, PrefixReuseRule::kEqual}) {
    if (name == Name(rule)) return rule;
  }
  return std::nullopt;
}

bool MayReuse(PrefixReuseRule rule, const AttentionOptions& computed,
              const AttentionOptions& wanted) {
  const bool exact = computed.policy == AttentionPolicy::kDense;
  if (exact && rule == PrefixReuseRule::kLooser) return true;
  if (computed.policy != wanted.policy) return false;
  if (exact) return true;
  for (const AttentionThreshold& threshold : kAttentionThresholds) {
    if (Contains(kWithoutEffect, threshold.name)) continue;
    const ThresholdValue had = ValueOf(threshold, computed);
    const ThresholdValue asked = ValueOf(threshold, wanted);
    const bool stricter_will_do =
        rule == PrefixReuseRule::kLooser && Contains(kMoreIsStricter, threshold.name);
    if (stricter_will_do ? had < asked : had != asked) return false;
  }
  return true;
}

}  // namespace prefilld::model
