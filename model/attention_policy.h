// How a prompt's attention is computed: policy and thresholds.
#ifndef PREFILLD_MODEL_ATTENTION_POLICY_H_
#define PREFILLD_MODEL_ATTENTION_POLICY_H_

#include <cstdint>

#include "absl/status/status.h"

namespace prefilld::model {

enum class AttentionPolicy : uint8_t { kDense, kVerticalSlash, kShare, kAuto };

const char* Name(AttentionPolicy policy);

// Thresholds of SharePrefill (arXiv 2505.19578) as model/pattern_sharing.h uses them; the
// defaults are ours, tuned on the embedded model.
struct AttentionOptions {
  AttentionPolicy policy = AttentionPolicy::kAuto;
  float gamma = 0.9f;     // (0, 1]: mass a pattern must cover
  float tau = 0.4f;       // [0, 1]: a head shares when its distance to the pivot is below tau
  float delta = 1.0f;     // [0, 1]: a head farther than this from uniform does not share; 1: off
  float coverage = 0.85f;  // [0, 1]: a cluster shares when vertical-slash covers less than this
  int64_t min_budget_tokens = 1024;  // floor of vertical-slash columns, and of diagonals
  bool same_layer_sharing = true;
  int64_t crossover_tokens = 4096;  // kAuto: dense below, share from here on
};

// INVALID_ARGUMENT names field, value and range. NaN is outside every range.
absl::Status Validate(const AttentionOptions& options);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_ATTENTION_POLICY_H_
