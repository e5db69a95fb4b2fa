// Statuses on their way to the caller.
#ifndef PREFILLD_SERVER_STATUS_DETAILS_H_
#define PREFILLD_SERVER_STATUS_DETAILS_H_

#include <grpcpp/support/status.h>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace prefilld::server {

// `status` with a google.rpc.RetryInfo payload.
absl::Status WithRetryDelay(absl::Status status, absl::Duration delay);

// Same code and message; payloads become the details of a google.rpc.Status.
grpc::Status ToGrpcStatus(const absl::Status& status);
absl::Status FromGrpcStatus(const grpc::Status& status);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_STATUS_DETAILS_H_
