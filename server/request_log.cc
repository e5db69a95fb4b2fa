#include "server/request_log.h"

#include "server/log.h"

namespace prefilld::server {
namespace {

// What an id may have, and some more; a refused one may be as long as a request.
constexpr size_t kMaxLoggedId = 150;
constexpr size_t kMaxLoggedMessage = 300;

double Milliseconds(absl::Duration duration) { return absl::ToDoubleMilliseconds(duration); }

}  // namespace

void LogRequest(PrefillJob& job) {
  const JobStats stats = job.stats();
  const Delivery::Sent sent = job.delivery().sent();
  const PrefillWork& work = job.work();
  const Outcome outcome = job.outcome();

  LogFields fields = {{"id", work.id},
                      {"outcome", Name(outcome)},
                      {"tokens", static_cast<int64_t>(work.tokens.size())}};
  const absl::Duration age = job.age();
  if (stats.started_at.has_value()) {
    fields.emplace_back("queue_ms", Milliseconds(*stats.started_at - stats.accepted_at));
  }
  if (stats.policy.has_value()) fields.emplace_back("policy", model::Name(*stats.policy));
  if (stats.batch_prompts > 1) fields.emplace_back("batch", int64_t{stats.batch_prompts});
  fields.emplace_back("layers", static_cast<int64_t>(stats.layers.size()));
  if (!stats.layers.empty()) {
    const auto total = SumOf(stats.layers);
    fields.emplace_back("density", total.density());
    fields.emplace_back("layers_ms", static_cast<double>(total.compute_us()) * 1e-3);
    fields.emplace_back("attention_ms", static_cast<double>(total.attention_us()) * 1e-3);
    fields.emplace_back("pattern_ms", static_cast<double>(total.pattern_us()) * 1e-3);
    fields.emplace_back("stall_ms", Milliseconds(stats.stalled));
    if (total.has_recall()) {
      const auto& audit = total.recall();
      if (audit.has_shared()) fields.emplace_back("recall_shared", audit.shared().mean());
      if (audit.has_vertical_slash()) {
        fields.emplace_back("recall_vertical_slash", audit.vertical_slash().mean());
      }
      fields.emplace_back("audit_ms", static_cast<double>(audit.audit_us()) * 1e-3);
    }
  }
  if (stats.first_token_at.has_value()) {
    fields.emplace_back("ttft_ms", Milliseconds(*stats.first_token_at - stats.accepted_at));
    fields.emplace_back("tail_ms", Milliseconds(stats.accepted_at + age - *stats.first_token_at));
  }
  if (stats.logprobs.has_value()) {
    fields.emplace_back("logprobs_ms", Milliseconds(*stats.logprobs));
  }
  fields.emplace_back("total_ms", Milliseconds(age));
  fields.emplace_back("kv_bytes", sent.bytes);
  fields.emplace_back("lanes", static_cast<int64_t>(work.num_lanes));
  fields.emplace_back("peer", work.peer);
  if (work.pushes()) fields.emplace_back("deliver_to", work.deliver_to.address());
  if (!work.trace_id.empty()) fields.emplace_back("trace_id", work.trace_id);
  if (outcome != Outcome::kOk) fields.emplace_back("status", job.status().ToString());
  LogEvent(outcome == Outcome::kOk ? LogLevel::kInfo : LogLevel::kWarning, "request", fields);
}

void LogRefused(const std::string& request_id, const std::string& peer, Outcome outcome,
                const absl::Status& status) {
  LogEvent(LogLevel::kWarning, "request",
           {{"id", request_id.substr(0, kMaxLoggedId)},
            {"outcome", Name(outcome)},
            {"peer", peer},
            {"status", std::string(absl::StatusCodeToString(status.code())) + ": " +
                           std::string(status.message().substr(0, kMaxLoggedMessage))}});
}

}  // namespace prefilld::server
