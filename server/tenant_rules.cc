#include "server/tenant_rules.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"
#include "proto/wire/address_pattern.h"
#include "server/prefill_work.h"
#include "server/refusal_cause.h"
#include "server/tenants.h"

namespace prefilld::server {
namespace {

absl::Status CheckLanes(const Tenant& tenant, const std::string& field, const PrefillWork& work) {
  if (tenant.max_lanes == 0 || work.num_lanes <= tenant.max_lanes || work.lanes_are_chosen) {
    return absl::OkStatus();
  }
  return Because(RefusalCause::kTenantLanes,
                 absl::PermissionDeniedError(absl::StrCat(field, " ", work.num_lanes, "; tenant ",
                                                          tenant.name, " may use at most ",
                                                          tenant.max_lanes, " (max_lanes)")));
}

// `field` is the receiver's name in the request.
absl::Status CheckPush(const Tenant& tenant, const std::string& field, const std::string& address) {
  if (!tenant.pushes) {
    return Because(
        RefusalCause::kTenantPushes,
        absl::PermissionDeniedError(absl::StrCat(
            field, " ", address, "; nothing is pushed for tenant ", tenant.name, " (pushes)")));
  }
  const auto admits = [&address](const std::string& pattern) {
    return wire::AddressMatches(pattern, address);
  };
  if (tenant.deliver_to.empty() ||
      std::any_of(tenant.deliver_to.begin(), tenant.deliver_to.end(), admits)) {
    return absl::OkStatus();
  }
  // The patterns say what the operator's network looks like, so they are not told.
  return Because(RefusalCause::kTenantPushTarget,
                 absl::PermissionDeniedError(
                     absl::StrCat(field, " ", address, "; none of the ", tenant.deliver_to.size(),
                                  " patterns of tenant ", tenant.name, " admits it (deliver_to)")));
}

}  // namespace

void LowerChosenLanes(const Tenant& tenant, PrefillWork& work) {
  if (tenant.max_lanes == 0) return;
  if (work.lanes_are_chosen) work.num_lanes = std::min(work.num_lanes, tenant.max_lanes);
  for (PrefillWork& push : work.further_pushes) LowerChosenLanes(tenant, push);
}

absl::Status CheckTenantRules(const Tenant& tenant, const PrefillWork& work) {
  const bool computes = work.receiver == 0;
  const auto& policies = tenant.policies;
  if (computes && !policies.empty() &&
      std::find(policies.begin(), policies.end(), work.attention.policy) == policies.end()) {
    return Because(RefusalCause::kTenantPolicy,
                   absl::PermissionDeniedError(absl::StrCat(
                       "attention.policy ", model::Name(work.attention.policy), "; tenant ",
                       tenant.name, " may ask for ", model::PolicyNames(policies), " (policies)")));
  }
  PREFILLD_RETURN_IF_ERROR(CheckLanes(tenant, "num_lanes", work));
  if (work.pushes()) {
    PREFILLD_RETURN_IF_ERROR(CheckPush(tenant, "deliver_to.address", work.deliver_to.address()));
  }
  for (size_t i = 0; i < work.further_pushes.size(); ++i) {
    const PrefillWork& push = work.further_pushes[i];
    PREFILLD_RETURN_IF_ERROR(CheckLanes(tenant, absl::StrCat("pushes[", i, "].num_lanes"), push));
    PREFILLD_RETURN_IF_ERROR(CheckPush(tenant, absl::StrCat("pushes[", i, "].deliver_to.address"),
                                       push.deliver_to.address()));
  }
  return absl::OkStatus();
}

}  // namespace prefilld::server
