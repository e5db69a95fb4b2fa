// The attention part of a request: policy and thresholds, between the wire contract and the model.
#ifndef PREFILLD_SERVER_ATTENTION_REQUEST_H_
#define PREFILLD_SERVER_ATTENTION_REQUEST_H_

#include <vector>

#include "absl/status/statusor.h"
#include "model/sparse/attention_options.h"
#include "prefill/v1/prefill.pb.h"
#include "server/server_options.h"

namespace prefilld::server {

// What a request may ask for, and what it gets if it does not ask; fixed at start.
struct AttentionLimits {
  model::AttentionOptions defaults;
  std::vector<model::AttentionPolicy> allowed_policies;
  RecallAuditLimits recall_audit;
};

// The server's defaults with what the request names over them. Fields and thresholds are matched by
// their names. A request that does not mention recall_audit_rows is measured with the probability
// that the limits give. INVALID_ARGUMENT names field, value and limit.
absl::StatusOr<model::AttentionOptions> ResolveAttention(
    const ::prefill::v1::AttentionOptions& request, const AttentionLimits& limits);

::prefill::v1::AttentionPolicy ToProto(model::AttentionPolicy policy);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_ATTENTION_REQUEST_H_
