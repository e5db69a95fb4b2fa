#include "server/attention_request.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <variant>

#include "absl/random/random.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "proto/status_macros.h"
#include "proto/wire/enum_names.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;
using model::AttentionPolicy;

bool Drawn(double probability) {
  static thread_local absl::BitGen random;
  return absl::Bernoulli(random, probability);
}

// Returns nullopt when the request leaves the policy to the server.
absl::StatusOr<std::optional<AttentionPolicy>> ReadPolicy(
    v1::AttentionPolicy asked, const std::vector<AttentionPolicy>& allowed) {
  if (asked == v1::ATTENTION_POLICY_UNSPECIFIED) return std::nullopt;
  const auto policy = model::ParsePolicy(wire::EnumName(asked));
  if (!policy.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat("attention.policy ", static_cast<int>(asked),
                                                   " unknown; ", model::PolicyNames(allowed)));
  }
  if (std::find(allowed.begin(), allowed.end(), *policy) == allowed.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat("attention.policy ", model::Name(*policy), " is not allowed here; allowed: ",
                     absl::StrJoin(allowed, " ", [](std::string* out, AttentionPolicy one) {
                       absl::StrAppend(out, model::Name(one));
                     })));
  }
  return policy;
}

// Reads thresholds by name. A test ensures that every threshold that a request may name has a field
// of its name and of a fitting type.
model::AttentionOverrides ReadThresholds(const v1::AttentionOptions& request) {
  const google::protobuf::Reflection& values = *request.GetReflection();
  model::AttentionOverrides asked;
  for (const model::AttentionThreshold& threshold : model::kAttentionThresholds) {
    if ((threshold.setters & model::kRequest) == 0) continue;
    const auto* field = request.GetDescriptor()->FindFieldByName(threshold.name);
    if (field == nullptr || !values.HasField(request, field)) continue;
    std::visit(
        [&](const auto& members) {
          using T = typename std::decay_t<decltype(members)>::Value;
          if constexpr (std::is_same_v<T, float>) {
            asked.*members.named = values.GetFloat(request, field);
          } else if constexpr (std::is_same_v<T, bool>) {
            asked.*members.named = values.GetBool(request, field);
          } else {
            asked.*members.named = values.GetUInt32(request, field);
          }
        },
        threshold.members);
  }
  return asked;
}

}  // namespace

absl::StatusOr<model::AttentionOptions> ResolveAttention(const v1::AttentionOptions& request,
                                                         int64_t num_tokens,
                                                         const AttentionLimits& limits) {
  model::AttentionOverrides asked = ReadThresholds(request);
  PREFILLD_ASSIGN_OR_RETURN(asked.policy, ReadPolicy(request.policy(), limits.allowed_policies));
  const RecallAuditLimits& audit = limits.recall_audit;
  if (!asked.recall_audit_rows.has_value()) {
    asked.recall_audit_rows = Drawn(audit.fraction) ? audit.rows : 0;
  } else if (*asked.recall_audit_rows > audit.rows) {
    return absl::InvalidArgumentError(absl::StrCat(
        "attention.recall_audit_rows ", *asked.recall_audit_rows, "; at most ", audit.rows));
  }
  const bool is_calibrated = num_tokens <= limits.calibrated_tokens;
  const model::AttentionOptions options =
      model::Apply(asked, is_calibrated ? limits.defaults : limits.beyond_calibration);
  PREFILLD_RETURN_IF_ERROR(model::Validate(options));
  return options;
}

v1::AttentionPolicy ToProto(AttentionPolicy policy) {
  return wire::EnumFromName<v1::AttentionPolicy>(model::Name(policy))
      .value_or(v1::ATTENTION_POLICY_UNSPECIFIED);
}

}  // namespace prefilld::server
