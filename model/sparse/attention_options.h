// The thresholds of sparse attention. kAttentionThresholds is the only list of them: flags,
// requests, cluster files, logs, help and error messages are made from it. To add a threshold, add
// a member here to both structs and a row to the table; tests then name the flags and fields still
// missing.
#ifndef PREFILLD_MODEL_SPARSE_ATTENTION_OPTIONS_H_
#define PREFILLD_MODEL_SPARSE_ATTENTION_OPTIONS_H_

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <variant>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "model/sparse/attention_policy.h"

namespace prefilld::model {

// Policy and thresholds for one prompt, complete. SharePrefill (arXiv 2505.19578) is built from the
// thresholds in model/sparse/pattern_sharing.h. The defaults are ours, for a model whose cluster
// file has no thresholds. Their meaning stands in kAttentionThresholds below.
struct AttentionOptions {
  AttentionPolicy policy = AttentionPolicy::kAuto;
  float gamma = 0.9f;
  // Absent: gamma.
  std::optional<float> vertical_slash_gamma;
  float tau = 0.4f;
  float delta = 1.0f;
  float coverage = 0.85f;
  float score_threshold = 0.95f;
  int64_t score_stride = 8;
  float last_rows_gamma = 0.5f;
  int64_t min_budget_tokens = 128;
  bool same_layer_sharing = true;
  int64_t crossover_tokens = 4096;
  float density = 0.2f;
  // Measuring recall changes no result (model/sparse/recall_audit.h). 0: not measured.
  int64_t recall_audit_rows = 0;

  float gamma_of_vertical_slash() const { return vertical_slash_gamma.value_or(gamma); }
};

// The values that an operator, a request or a cluster file names. An absent value leaves what was
// there before.
struct AttentionOverrides {
  std::optional<AttentionPolicy> policy;
  std::optional<float> gamma, vertical_slash_gamma, tau, delta, coverage, score_threshold,
      last_rows_gamma, density;
  std::optional<int64_t> score_stride, min_budget_tokens, crossover_tokens, recall_audit_rows;
  std::optional<bool> same_layer_sharing;
};

// The members that keep a threshold of type T, and its limits. `Kept` is T, or optional<T> for a
// threshold that follows another one until it is named itself.
template <typename T, typename Kept = T>
struct ThresholdMembers {
  using Value = T;
  Kept AttentionOptions::*option;
  std::optional<T> AttentionOverrides::*named;
  T lowest = std::numeric_limits<T>::lowest();
  T highest = std::numeric_limits<T>::max();
  bool lowest_allowed = true;

  // The comparison is written so that NaN is outside.
  constexpr bool Contains(T value) const {
    return (lowest_allowed ? value >= lowest : value > lowest) && value <= highest;
  }
  // Formats the limits as "(0, 1]" or "[0, inf)"; empty for a bool.
  std::string LimitsText() const {
    if (std::is_same_v<T, bool>) return "";
    const std::string below =
        highest == std::numeric_limits<T>::max() ? "inf)" : absl::StrCat(highest, "]");
    return absl::StrCat(lowest_allowed ? "[" : "(", lowest, ", ", below);
  }
};

// The places where a threshold may be named, as bits to be combined.
enum ThresholdSetter : unsigned {
  kOperator = 1,  // by a flag of the server
  kRequest = 2,   // by a field of prefill.v1.AttentionOptions, hence a flag of prefill-cli and an
                  // argument of the Python client
  kClusterFile = 4,  // by a key of "thresholds" in the cluster file
};

struct AttentionThreshold {
  const char* name;  // in all these places
  std::variant<ThresholdMembers<float>, ThresholdMembers<float, std::optional<float>>,
               ThresholdMembers<int64_t>, ThresholdMembers<bool>>
      members;
  unsigned setters;
  const char* help;  // without limits and default, which ThresholdHelp() adds
};

inline constexpr AttentionThreshold kAttentionThresholds[] = {
    {"gamma",
     ThresholdMembers<float>{&AttentionOptions::gamma, &AttentionOverrides::gamma, 0.0f, 1.0f,
                             /*lowest_allowed=*/false},
     kOperator | kRequest | kClusterFile,
     "Mass that a pattern must cover. Named, it is --vertical_slash_gamma as well, unless that is "
     "named too."},
    {"vertical_slash_gamma",
     ThresholdMembers<float, std::optional<float>>{&AttentionOptions::vertical_slash_gamma,
                                                   &AttentionOverrides::vertical_slash_gamma, 0.0f,
                                                   1.0f, /*lowest_allowed=*/false},
     kOperator | kRequest | kClusterFile,
     "--gamma of policy vertical_slash, whose columns and diagonals each reach it and together "
     "hold "
     "far more, and of the set that --coverage judges. Absent: --gamma if that is named, else the "
     "cluster file's or the built-in one."},
    {"tau", ThresholdMembers<float>{&AttentionOptions::tau, &AttentionOverrides::tau, 0.0f, 1.0f},
     kOperator | kRequest | kClusterFile,
     "A head shares its cluster's pattern when its distance to the pivot is below this."},
    {"delta",
     ThresholdMembers<float>{&AttentionOptions::delta, &AttentionOverrides::delta, 0.0f, 1.0f},
     kOperator | kRequest | kClusterFile,
     "A head farther than this from uniform does not share. 1: no such rule."},
    {"coverage",
     ThresholdMembers<float>{&AttentionOptions::coverage, &AttentionOverrides::coverage, 0.0f,
                             1.0f},
     kOperator | kRequest | kClusterFile,
     "A cluster shares when vertical-slash covers less of its pivot than this, or costs more."},
    {"score_threshold",
     ThresholdMembers<float>{&AttentionOptions::score_threshold,
                             &AttentionOverrides::score_threshold, 0.0f, 1.0f,
                             /*lowest_allowed=*/false},
     kOperator | kRequest | kClusterFile,
     "Part of each row's antidiagonal scores that the blocks of a scored head hold."},
    {"score_stride",
     ThresholdMembers<int64_t>{&AttentionOptions::score_stride, &AttentionOverrides::score_stride,
                               8, 16},
     kOperator | kRequest | kClusterFile,
     "Tokens that antidiagonal scores take together, 8 or 16: 16 costs half and sees less."},
    {"last_rows_gamma",
     ThresholdMembers<float>{&AttentionOptions::last_rows_gamma,
                             &AttentionOverrides::last_rows_gamma, 0.0f, 1.0f,
                             /*lowest_allowed=*/false},
     kOperator | kRequest | kClusterFile,
     "Mass of the columns, and of the diagonals, that the last queries add to a scored head's "
     "blocks."},
    {"min_budget_tokens",
     ThresholdMembers<int64_t>{&AttentionOptions::min_budget_tokens,
                               &AttentionOverrides::min_budget_tokens, 0},
     kOperator | kRequest | kClusterFile,
     "Least number of columns, and of diagonals, that the last queries choose."},
    {"same_layer_sharing",
     ThresholdMembers<bool>{&AttentionOptions::same_layer_sharing,
                            &AttentionOverrides::same_layer_sharing},
     kRequest, "Heads may share a pivot of their own layer."},
    {"crossover_tokens",
     ThresholdMembers<int64_t>{&AttentionOptions::crossover_tokens,
                               &AttentionOverrides::crossover_tokens, 0},
     kOperator,
     "Policy auto is dense for prompts shorter than this, and shares from here on. Not set: "
     "measured "
     "at start (model/prefill/crossover.h)."},
    {"density",
     ThresholdMembers<float>{&AttentionOptions::density, &AttentionOverrides::density, 0.0f, 1.0f,
                             /*lowest_allowed=*/false},
     kRequest, "Share of each row's blocks that baseline_random computes."},
    {"recall_audit_rows",
     ThresholdMembers<int64_t>{&AttentionOptions::recall_audit_rows,
                               &AttentionOverrides::recall_audit_rows, 0},
     kRequest,
     "Query blocks per layer whose true attention is computed beside the sparse run, to measure "
     "how much of its mass the patterns hold."},
};

// Returns the row of that name. A name that is not in the table does not compile in a constant
// expression and ends the program elsewhere: in the help of a flag that is before main.
constexpr const AttentionThreshold& ThresholdNamed(absl::string_view name) {
  for (const AttentionThreshold& threshold : kAttentionThresholds) {
    if (name == threshold.name) return threshold;
  }
  throw "no threshold has this name";
}

// Returns the sentence for --help: what the threshold does, its limits and its built-in value.
std::string ThresholdHelp(const AttentionThreshold& threshold);

using ThresholdValue = std::variant<float, int64_t, bool>;
// Returns the value in force. A threshold that follows another one has that one's value.
ThresholdValue ValueOf(const AttentionThreshold& threshold, const AttentionOptions& options);

// Checks policy and thresholds. INVALID_ARGUMENT names field, value and limits.
absl::Status Validate(const AttentionOptions& options);

// Returns `options` with the values that `overrides` names. A gamma that is named without
// vertical_slash_gamma holds for vertical-slash as well.
AttentionOptions Apply(const AttentionOverrides& overrides, AttentionOptions options);

// Returns the policy that runs for a prompt of `num_tokens`, which is never kAuto. A prompt of one
// or two pattern blocks is dense under every policy, since its pattern would be all of it. kAuto is
// kShare from crossover_tokens on, with and without head clusters.
AttentionPolicy ResolvePolicy(const AttentionOptions& options, int64_t num_tokens,
                              int block_tokens);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_ATTENTION_OPTIONS_H_
