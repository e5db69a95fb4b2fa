// Why a call was refused: the `cause` label of prefilld_refusals_total. Outcomes (outcome.h) say
// how requests end; causes are finer, so that an operator sees which limit callers meet.
#ifndef PREFILLD_SERVER_REFUSAL_CAUSE_H_
#define PREFILLD_SERVER_REFUSAL_CAUSE_H_

#include <array>
#include <cstdint>

#include "absl/status/status.h"

namespace prefilld::server {

enum class RefusalCause : uint8_t {
  kInvalid,             // a field is out of range, or the request cannot be parsed
  kModel,               // another model was asked for
  kUnauthenticated,     // the caller is none of the tenants
  kCertificate,         // a tenant's token beside a certificate that is not the tenant's
  kTenantRequests,      // a limit of the tenant: max_requests
  kTenantQueuedTokens,  // max_queued_tokens
  kTenantRate,          // tokens_per_second
  kTenantPolicy,        // policies
  kTenantLanes,         // max_lanes
  kTenantPushes,        // pushes
  kTenantPushTarget,    // deliver_to
  kPushTarget,          // not on the server's own list, or no push is
  kForbidden,           // a key of lanes or receivers, or the prefix cache
  kQueueFull,           // no tenant could have more of it
  kTenantShare,         // the queue has room, which is kept for other tenants
  kReceivers,           // too many wait for their requests
  kWatchers,            // too many follow the prefix cache
  kDeadline,
  kDuplicate,
  kUnknown,      // no request is there to attach to
  kOver,         // nor to resume, acknowledge or cancel, because it has ended
  kCancelled,    // by the caller, while the request waited for its id
  kUnavailable,  // draining, or the device has failed
};

inline constexpr std::array<RefusalCause, 23> kRefusalCauses = {RefusalCause::kInvalid,
                                                                RefusalCause::kModel,
                                                                RefusalCause::kUnauthenticated,
                                                                RefusalCause::kCertificate,
                                                                RefusalCause::kTenantRequests,
                                                                RefusalCause::kTenantQueuedTokens,
                                                                RefusalCause::kTenantRate,
                                                                RefusalCause::kTenantPolicy,
                                                                RefusalCause::kTenantLanes,
                                                                RefusalCause::kTenantPushes,
                                                                RefusalCause::kTenantPushTarget,
                                                                RefusalCause::kPushTarget,
                                                                RefusalCause::kForbidden,
                                                                RefusalCause::kQueueFull,
                                                                RefusalCause::kTenantShare,
                                                                RefusalCause::kReceivers,
                                                                RefusalCause::kWatchers,
                                                                RefusalCause::kDeadline,
                                                                RefusalCause::kDuplicate,
                                                                RefusalCause::kUnknown,
                                                                RefusalCause::kOver,
                                                                RefusalCause::kCancelled,
                                                                RefusalCause::kUnavailable};

const char* Name(RefusalCause cause);

// Notes the cause in a status that is an error. It stays in this process: callers are not told.
absl::Status Because(RefusalCause cause, absl::Status status);
// Returns what Because has noted or, where nobody has, what the code stands for.
RefusalCause CauseOf(const absl::Status& status);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_REFUSAL_CAUSE_H_
