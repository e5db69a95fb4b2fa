#include "server/refusal_cause.h"

#include <string>

#include "absl/strings/cord.h"
#include "proto/wire/grpc_status.h"

namespace prefilld::server {

const char* Name(RefusalCause cause) {
  switch (cause) {
    case RefusalCause::kInvalid:
      return "invalid";
    case RefusalCause::kModel:
      return "model";
    case RefusalCause::kUnauthenticated:
      return "unauthenticated";
    case RefusalCause::kCertificate:
      return "certificate";
    case RefusalCause::kTenantRequests:
      return "tenant_requests";
    case RefusalCause::kTenantQueuedTokens:
      return "tenant_queued_tokens";
    case RefusalCause::kTenantRate:
      return "tenant_rate";
    case RefusalCause::kTenantPolicy:
      return "tenant_policy";
    case RefusalCause::kTenantLanes:
      return "tenant_lanes";
    case RefusalCause::kTenantPushes:
      return "tenant_pushes";
    case RefusalCause::kTenantPushTarget:
      return "tenant_push_target";
    case RefusalCause::kPushTarget:
      return "push_target";
    case RefusalCause::kForbidden:
      return "forbidden";
    case RefusalCause::kQueueFull:
      return "queue_full";
    case RefusalCause::kTenantShare:
      return "tenant_share";
    case RefusalCause::kReceivers:
      return "receivers";
    case RefusalCause::kWatchers:
      return "watchers";
    case RefusalCause::kDeadline:
      return "deadline";
    case RefusalCause::kDuplicate:
      return "duplicate";
    case RefusalCause::kUnknown:
      return "unknown";
    case RefusalCause::kOver:
      return "over";
    case RefusalCause::kCancelled:
      return "cancelled";
    case RefusalCause::kUnavailable:
      return "unavailable";
  }
  return "?";
}

absl::Status Because(RefusalCause cause, absl::Status status) {
  if (!status.ok()) status.SetPayload(wire::kLocalPayload, absl::Cord(Name(cause)));
  return status;
}

RefusalCause CauseOf(const absl::Status& status) {
  if (const auto noted = status.GetPayload(wire::kLocalPayload); noted.has_value()) {
    for (const RefusalCause cause : kRefusalCauses) {
      if (*noted == Name(cause)) return cause;
    }
  }
  switch (status.code()) {
    case absl::StatusCode::kFailedPrecondition:
      return RefusalCause::kModel;
    case absl::StatusCode::kUnauthenticated:
      return RefusalCause::kUnauthenticated;
    case absl::StatusCode::kPermissionDenied:
      return RefusalCause::kForbidden;
    case absl::StatusCode::kResourceExhausted:
      return RefusalCause::kQueueFull;
    case absl::StatusCode::kDeadlineExceeded:
      return RefusalCause::kDeadline;
    case absl::StatusCode::kAlreadyExists:
      return RefusalCause::kDuplicate;
    case absl::StatusCode::kNotFound:
      return RefusalCause::kUnknown;
    case absl::StatusCode::kAborted:
      return RefusalCause::kOver;
    case absl::StatusCode::kCancelled:
      return RefusalCause::kCancelled;
    case absl::StatusCode::kUnavailable:
      return RefusalCause::kUnavailable;
    default:
      return RefusalCause::kInvalid;
  }
}

}  // namespace prefilld::server
