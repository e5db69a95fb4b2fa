#include "model/sparse/attention_policy.h"

#include <cstddef>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace prefilld::model {
namespace {

constexpr bool IsIndexedByPolicy() {
  for (size_t i = 0; i < std::size(kAttentionPolicies); ++i) {
    if (static_cast<size_t>(kAttentionPolicies[i].policy) != i) return false;
  }
  return true;
}
static_assert(IsIndexedByPolicy(), "a row of kAttentionPolicies stands out of the enum's order");

}  // namespace

bool IsValid(AttentionPolicy policy) {
  return static_cast<size_t>(policy) < std::size(kAttentionPolicies);
}

const char* Name(AttentionPolicy policy) {
  return IsValid(policy) ? kAttentionPolicies[static_cast<size_t>(policy)].name : "?";
}

bool IsBaseline(AttentionPolicy policy) {
  return IsValid(policy) && kAttentionPolicies[static_cast<size_t>(policy)].is_baseline;
}

std::optional<AttentionPolicy> ParsePolicy(absl::string_view name) {
  for (const AttentionPolicyInfo& info : kAttentionPolicies) {
    if (name == info.name) return info.policy;
  }
  return std::nullopt;
}

std::vector<AttentionPolicy> PoliciesForServing() {
  std::vector<AttentionPolicy> policies;
  for (const AttentionPolicyInfo& info : kAttentionPolicies) {
    if (!info.is_baseline) policies.push_back(info.policy);
  }
  return policies;
}

std::string PolicyNames(const std::vector<AttentionPolicy>& policies) {
  return absl::StrJoin(policies, ", ", [](std::string* out, AttentionPolicy policy) {
    absl::StrAppend(out, Name(policy));
  });
}

std::string AllPolicyNames() {
  return absl::StrJoin(
      kAttentionPolicies, ", ",
      [](std::string* out, const AttentionPolicyInfo& info) { absl::StrAppend(out, info.name); });
}

}  // namespace prefilld::model
