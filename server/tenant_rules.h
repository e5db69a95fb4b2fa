// Checks what the requests of a tenant ask for, beyond how many there may be (tenants.h).
#ifndef PREFILLD_SERVER_TENANT_RULES_H_
#define PREFILLD_SERVER_TENANT_RULES_H_

#include "absl/status/status.h"

namespace prefilld::server {

struct PrefillWork;
struct Tenant;

// Checks a request, or a further receiver of one, that the server itself would take.
// PERMISSION_DENIED names field, value, tenant and limit: the policy of attention, the number of
// lanes, that KV is pushed, or to whom.
absl::Status CheckTenantRules(const Tenant& tenant, const PrefillWork& work);

// Lowers lanes that the server chose for pushes to what the tenant may have.
void LowerChosenLanes(const Tenant& tenant, PrefillWork& work);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_TENANT_RULES_H_
