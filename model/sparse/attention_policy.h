// The attention policies and their names. kAttentionPolicies is the only list of them: flags, logs,
// metrics, requests and error messages are made from it.
#ifndef PREFILLD_MODEL_SPARSE_ATTENTION_POLICY_H_
#define PREFILLD_MODEL_SPARSE_ATTENTION_POLICY_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace prefilld::model {

enum class AttentionPolicy : uint8_t {
  kDense,
  kVerticalSlash,
  kShare,
  kAuto,
  kBaselineQueryAware,
  kBaselineRandom
};

struct AttentionPolicyInfo {
  AttentionPolicy policy;
  // The policy's name in flags, logs and metrics. In the wire contract it is in capitals, after
  // ATTENTION_POLICY_.
  const char* name;
  // Baselines serve evaluations (model/sparse/baseline_attention.h). A server runs them only if its
  // operator names them.
  bool is_baseline = false;
};

// Indexed by the policy's value.
inline constexpr AttentionPolicyInfo kAttentionPolicies[] = {
    {AttentionPolicy::kDense, "dense"},
    {AttentionPolicy::kVerticalSlash, "vertical_slash"},
    {AttentionPolicy::kShare, "share"},
    {AttentionPolicy::kAuto, "auto"},
    {AttentionPolicy::kBaselineQueryAware, "baseline_query_aware", /*is_baseline=*/true},
    {AttentionPolicy::kBaselineRandom, "baseline_random", /*is_baseline=*/true}};

// Tells whether the value is one of the enum; a number cast from elsewhere may not be.
bool IsValid(AttentionPolicy policy);
// Returns "?" for a value that is not valid.
const char* Name(AttentionPolicy policy);
bool IsBaseline(AttentionPolicy policy);

// Returns the policy of that name, or nullopt if there is none.
std::optional<AttentionPolicy> ParsePolicy(absl::string_view name);

// Lists every policy but the baselines.
std::vector<AttentionPolicy> PoliciesForServing();
// Joins the names of policies by commas, for messages and help.
std::string PolicyNames(const std::vector<AttentionPolicy>& policies);
std::string AllPolicyNames();

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_ATTENTION_POLICY_H_
