#ifndef PREFILLD_CLIENT_GRPC_STATUS_H_
#define PREFILLD_CLIENT_GRPC_STATUS_H_

#include <optional>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "grpcpp/support/status.h"

namespace prefilld::client {

// Both directions keep code, message and the binary details (google.rpc.Status, which holds the
// RetryInfo of RESOURCE_EXHAUSTED), so that a status can be passed on through several processes.
absl::Status FromGrpc(const grpc::Status& status);
grpc::Status ToGrpc(const absl::Status& status);

// When to come back, if the status says so.
std::optional<absl::Duration> RetryDelay(const absl::Status& status);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_GRPC_STATUS_H_
