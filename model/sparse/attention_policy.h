// How a prompt's attention is computed: policy and thresholds.
#ifndef PREFILLD_MODEL_SPARSE_ATTENTION_POLICY_H_
#define PREFILLD_MODEL_SPARSE_ATTENTION_POLICY_H_

#include <cstdint>
#include <optional>

#include "absl/status/status.h"

namespace prefilld::model {

// The baselines are for evaluations (model/sparse/baseline_attention.h).
enum class AttentionPolicy : uint8_t {
  kDense,
  kVerticalSlash,
  kShare,
  kBaselineQueryAware,
  kBaselineRandom,
  kAuto
};

inline constexpr AttentionPolicy kAttentionPolicies[] = {AttentionPolicy::kDense,
                                                         AttentionPolicy::kVerticalSlash,
                                                         AttentionPolicy::kShare,
                                                         AttentionPolicy::kAuto,
                                                         AttentionPolicy::kBaselineQueryAware,
                                                         AttentionPolicy::kBaselineRandom};

const char* Name(AttentionPolicy policy);
bool IsBaseline(AttentionPolicy policy);

// Thresholds of SharePrefill (arXiv 2505.19578) as model/sparse/pattern_sharing.h uses them; the
// defaults are ours, for a model whose head-cluster file names none.
struct AttentionOptions {
  AttentionPolicy policy = AttentionPolicy::kAuto;
  float gamma = 0.9f;  // (0, 1]: mass a pattern must cover
  // (0, 1]: gamma of vertical-slash sets, whose columns and diagonals each reach it and together
  // hold far more; absent: gamma. Whoever names gamma alone means both.
  std::optional<float> vertical_slash_gamma;
  float tau = 0.4f;    // [0, 1]: a head shares when its distance to the pivot is below tau
  float delta = 1.0f;  // [0, 1]: a head farther than this from uniform does not share; 1: off
  float coverage =
      0.85f;  // [0, 1]: a cluster shares when vertical-slash covers less, or costs more
  int64_t min_budget_tokens = 128;  // floor of vertical-slash columns, and of diagonals
  bool same_layer_sharing = true;
  int64_t crossover_tokens = 4096;  // kAuto: dense below, share from here on
  float density = 0.2f;             // (0, 1], kBaselineRandom: share of each row's blocks
  // Query blocks per layer whose true attention is computed beside the sparse run to measure the
  // recall of every sparse head (model/sparse/recall_audit.h); 0: none. Changes no result.
  int64_t recall_audit_rows = 0;

  float gamma_of_vertical_slash() const { return vertical_slash_gamma.value_or(gamma); }
};

// INVALID_ARGUMENT names field, value and range. NaN is outside every range.
absl::Status Validate(const AttentionOptions& options);

// What somebody asked for (an operator's flag, a request's field); absent: as it was, but for
// vertical_slash_gamma, which goes with gamma.
struct AttentionOverrides {
  std::optional<AttentionPolicy> policy;
  std::optional<float> gamma, vertical_slash_gamma, tau, delta, coverage;
  std::optional<int64_t> min_budget_tokens;
  std::optional<bool> same_layer_sharing;
  std::optional<int64_t> crossover_tokens;
};
AttentionOptions Apply(const AttentionOverrides& overrides, AttentionOptions options);

// What runs for a prompt of `num_tokens`: never kAuto. A prompt of one or two pattern blocks is
// dense whatever was asked, since its pattern would be all of it; kAuto is dense for a model
// without head clusters as well, for vertical-slash alone loses answers.
AttentionPolicy ResolvePolicy(const AttentionOptions& options, int64_t num_tokens, int block_tokens,
                              bool has_clusters);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_ATTENTION_POLICY_H_
