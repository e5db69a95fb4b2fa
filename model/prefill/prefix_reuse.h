// The rule by which KV that was computed for one request may serve another one.
#ifndef PREFILLD_MODEL_PREFILL_PREFIX_REUSE_H_
#define PREFILLD_MODEL_PREFILL_PREFIX_REUSE_H_

#include <cstdint>
#include <optional>

#include "absl/strings/string_view.h"
#include "model/sparse/attention_options.h"

namespace prefilld::model {

// Dense attention is exact, so what it computed is right for everyone. Sparse attention leaves mass
// out, and a request must not get KV that is less exact than what it asked for.
enum class PrefixReuseRule : uint8_t {
  // KV computed densely serves every request. KV computed sparsely serves requests of the same
  // policy whose gamma, vertical_slash_gamma, score_threshold, last_rows_gamma and
  // min_budget_tokens are at most as large, and whose other thresholds are equal.
  kLooser,
  // KV serves requests of the same policy and thresholds alone. A sparse request then gets what it
  // would get from the same prompts without dense ones beside them.
  kEqual,
};

inline constexpr char kPrefixReuseRuleNames[] = "looser, equal";
const char* Name(PrefixReuseRule rule);
std::optional<PrefixReuseRule> ParsePrefixReuseRule(absl::string_view name);

// Tells whether KV computed with `computed` may serve a request for `wanted`. Both have their
// policies resolved.
bool MayReuse(PrefixReuseRule rule, const AttentionOptions& computed,
              const AttentionOptions& wanted);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_PREFIX_REUSE_H_
