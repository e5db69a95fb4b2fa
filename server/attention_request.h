// Converts the attention part of a request, which is its policy and thresholds, from the wire
// contract to the model's form.
#ifndef PREFILLD_SERVER_ATTENTION_REQUEST_H_
#define PREFILLD_SERVER_ATTENTION_REQUEST_H_

#include <cstdint>
#include <limits>
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
  // The defaults for prompts of more tokens than the loss was calibrated for.
  model::AttentionOptions beyond_calibration = {};
  int64_t calibrated_tokens = std::numeric_limits<int64_t>::max();
  std::vector<model::AttentionPolicy> allowed_policies;
  RecallAuditLimits recall_audit;
};

// Returns the server's defaults for a prompt of so many tokens, with the values that the request
// names. Fields and thresholds are
// matched by their names. A request without recall_audit_rows is measured with the probability that
// the limits give. INVALID_ARGUMENT names field, value and limit.
absl::StatusOr<model::AttentionOptions> ResolveAttention(
    const ::prefill::v1::AttentionOptions& request, int64_t num_tokens,
    const AttentionLimits& limits);

::prefill::v1::AttentionPolicy ToProto(model::AttentionPolicy policy);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_ATTENTION_REQUEST_H_
