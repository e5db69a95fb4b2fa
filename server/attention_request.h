// Converts the attention part of a request, which is its policy and thresholds, from the wire
// contract to the model's form.
#ifndef PREFILLD_SERVER_ATTENTION_REQUEST_H_
#define PREFILLD_SERVER_ATTENTION_REQUEST_H_

#include <vector>

#include "absl/status/statusor.h"
#include "model/sparse/attention_options.h"
#include "prefill/v1/prefill.pb.h"
#include "server/server_options.h"

namespace prefilld::server {

// The limits of what a request may ask for, and the defaults if it does not ask. They are fixed at
// start.
struct AttentionLimits {
  model::AttentionOptions defaults;
  std::vector<model::AttentionPolicy> allowed_policies;
  RecallAuditLimits recall_audit;
};

// Returns the server's defaults with the values that the request names. Fields and thresholds are
// matched by their names. A request without recall_audit_rows is measured with the probability that
// the limits give. INVALID_ARGUMENT names field, value and limit.
absl::StatusOr<model::AttentionOptions> ResolveAttention(
    const ::prefill::v1::AttentionOptions& request, const AttentionLimits& limits);

::prefill::v1::AttentionPolicy ToProto(model::AttentionPolicy policy);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_ATTENTION_REQUEST_H_
