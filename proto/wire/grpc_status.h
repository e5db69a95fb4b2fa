// Converts statuses between Abseil's form, which this code uses, and gRPC's, which crosses the
// wire.
//
// Details (the Any messages of a google.rpc.Status, such as the RetryInfo of RESOURCE_EXHAUSTED)
// survive both directions, so that a status can be passed on through several processes. Received
// details stay one opaque payload, and payloads that are set here are added to them.
#ifndef PREFILLD_PROTO_WIRE_GRPC_STATUS_H_
#define PREFILLD_PROTO_WIRE_GRPC_STATUS_H_

#include <optional>

#include <grpcpp/support/status.h>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace prefilld::wire {

// A payload under this URL is for the process alone: it does not cross the wire.
inline constexpr absl::string_view kLocalPayload = "local";

grpc::Status ToGrpc(const absl::Status& status);
absl::Status FromGrpc(const grpc::Status& status);

// Returns `status` with a google.rpc.RetryInfo that tells its caller when to come back.
absl::Status WithRetryDelay(absl::Status status, absl::Duration delay);
// Returns when to come back, if the status says so: set here by WithRetryDelay, or received.
std::optional<absl::Duration> RetryDelay(const absl::Status& status);

// Returns `status` with `prefix` in front of its message, and the same code and details.
absl::Status WithPrefix(absl::string_view prefix, const absl::Status& status);

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_GRPC_STATUS_H_
