#include "server/request_log.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/process/log.h"
#include "proto/wire/enum_names.h"
#include "proto/wire/kv_layout.h"
#include "proto/wire/request_id.h"
#include "server/refusal_cause.h"

namespace prefilld::server {
namespace {

double Milliseconds(absl::Duration duration) { return absl::ToDoubleMilliseconds(duration); }

std::string Shown(const absl::Status& status) {
  return absl::StrCat(absl::StatusCodeToString(status.code()), ": ",
                      wire::ShownReason(status.message()));
}

// Leaves out what there is not. No field holds anything of the prompt.
void AddCaller(const Caller& caller, process::LogFields& fields) {
  fields.emplace_back("peer", caller.peer);
  for (const auto& [name, value] : {std::pair("certificate", &caller.certificate),
                                    {"user_agent", &caller.user_agent},
                                    {"tenant", &caller.tenant}}) {
    if (!value->empty()) fields.emplace_back(name, *value);
  }
}

// With these a collector makes a span of the line (deploy/security.md), which ends now.
void AddSpan(const wire::TraceContext& trace, absl::Duration took, process::LogFields& fields) {
  fields.emplace_back("trace_id", trace.trace_id);
  fields.emplace_back("span_id", trace.span_id);
  if (!trace.parent_span_id.empty()) fields.emplace_back("parent_span_id", trace.parent_span_id);
  fields.emplace_back("start_unix_ns", absl::ToUnixNanos(absl::Now() - took));
}

void AddRefusal(const Caller& caller, const absl::Status& status, process::LogFields& fields) {
  const absl::Duration took = absl::Now() - caller.arrived_at;
  fields.emplace_back("total_ms", Milliseconds(took));
  AddCaller(caller, fields);
  AddSpan(caller.trace, took, fields);
  fields.emplace_back("status", Shown(status));
}

// Names the type in which the KV is sent.
void AddKvType(const ::prefill::v1::KvLayout& layout, process::LogFields& fields) {
  fields.emplace_back("kv_dtype", wire::EnumName(layout.dtype()));
  if (wire::HasScales(layout.dtype())) {
    fields.emplace_back("kv_scales", wire::EnumName(layout.scales()));
  }
}

}  // namespace

void LogRequest(PrefillJob& job, absl::Time now) {
  const RequestStats stats = job.record().stats();
  const Delivery::Sent sent = job.delivery().sent();
  const PrefillWork& work = job.work();
  const Ending ending = job.ending();

  process::LogFields fields = {{"id", work.id},
                               {"outcome", Name(ending.outcome)},
                               {"tokens", static_cast<int64_t>(work.tokens.size())}};
  if (stats.started_at.has_value()) {
    fields.emplace_back("queue_ms", Milliseconds(*stats.started_at - stats.accepted_at));
  }
  if (stats.policy.has_value()) fields.emplace_back("policy", model::Name(*stats.policy));
  if (work.beyond_calibration) fields.emplace_back("beyond_calibration", "yes");
  if (stats.cached_tokens > 0) fields.emplace_back("cached_tokens", stats.cached_tokens);
  if (stats.batch_prompts > 1) fields.emplace_back("batch", int64_t{stats.batch_prompts});
  fields.emplace_back("layers", int64_t{stats.layers_computed});
  if (stats.layers_computed > 0) {
    const model::LayerReport& total = stats.total;
    fields.emplace_back("density", total.density);
    fields.emplace_back("layers_ms", static_cast<double>(total.compute_us) * 1e-3);
    fields.emplace_back("attention_ms", static_cast<double>(total.attention_us) * 1e-3);
    fields.emplace_back("pattern_ms", static_cast<double>(total.pattern_us) * 1e-3);
    fields.emplace_back("stall_ms", Milliseconds(stats.stalled));
    if (const auto shared = RecallOf(total.recall, model::PatternSource::kPivot)) {
      fields.emplace_back("recall_shared", shared->mean);
    }
    if (const auto scored = RecallOf(total.recall, model::PatternSource::kScored)) {
      fields.emplace_back("recall_scored", scored->mean);
    }
    if (const auto vertical = RecallOf(total.recall, model::PatternSource::kVerticalSlash)) {
      fields.emplace_back("recall_vertical_slash", vertical->mean);
    }
    if (!total.recall.empty()) {
      fields.emplace_back("audit_ms", static_cast<double>(total.audit_us) * 1e-3);
    }
  }
  if (stats.first_token_at.has_value()) {
    fields.emplace_back("compute_ms", Milliseconds(*stats.first_token_at - *stats.started_at));
    fields.emplace_back("ttft_ms", Milliseconds(*stats.first_token_at - stats.accepted_at));
    fields.emplace_back("tail_ms", Milliseconds(now - *stats.first_token_at));
  }
  if (stats.logprobs.has_value()) {
    fields.emplace_back("logprobs_ms", Milliseconds(*stats.logprobs));
  }
  fields.emplace_back("total_ms", Milliseconds(now - stats.accepted_at));
  fields.emplace_back("kv_bytes", sent.bytes);
  if (sent.shared_bytes > 0) fields.emplace_back("shared_memory_bytes", sent.shared_bytes);
  AddKvType(work.layout, fields);
  fields.emplace_back("lanes", static_cast<int64_t>(work.num_lanes));
  if (work.num_receivers > 1) fields.emplace_back("receivers", int64_t{work.num_receivers});
  AddCaller(work.caller, fields);
  if (work.priority != 0) fields.emplace_back("priority", int64_t{work.priority});
  if (work.pushes()) fields.emplace_back("deliver_to", work.deliver_to.address());
  AddSpan(work.caller.trace, now - stats.accepted_at, fields);
  const bool ok = ending.outcome == Outcome::kOk;
  if (!ok) fields.emplace_back("status", Shown(ending.status));
  process::LogEvent(ok ? process::LogLevel::kInfo : process::LogLevel::kWarning, "request", fields);
}

void LogReceiver(PrefillJob& receiver, absl::Time now) {
  const PrefillWork& work = receiver.work();
  const Ending ending = receiver.ending();
  const bool ok = ending.outcome == Outcome::kOk;
  const absl::Duration total = now - receiver.record().stats().accepted_at;
  process::LogFields fields = {{"id", wire::ShownId(work.id)},
                               {"receiver", int64_t{work.receiver}},
                               {"outcome", Name(ending.outcome)},
                               {"total_ms", Milliseconds(total)},
                               {"kv_bytes", receiver.delivery().sent().bytes},
                               {"shared_memory_bytes", receiver.delivery().sent().shared_bytes},
                               {"first_head", static_cast<int64_t>(work.layout.first_head())},
                               {"heads", static_cast<int64_t>(work.layout.num_heads())},
                               {"lanes", static_cast<int64_t>(work.num_lanes)}};
  AddKvType(work.layout, fields);
  AddCaller(work.caller, fields);
  if (work.pushes()) {
    // Its caller is that of the request, and its span stands in the line of the push.
    fields.emplace_back("deliver_to", work.deliver_to.address());
    fields.emplace_back("trace_id", work.caller.trace.trace_id);
  } else {
    AddSpan(work.caller.trace, total, fields);
  }
  if (!ok) fields.emplace_back("status", Shown(ending.status));
  process::LogEvent(ok ? process::LogLevel::kInfo : process::LogLevel::kWarning, "receiver",
                    fields);
}

void LogPush(const PrefillWork& work, const wire::TraceContext& span, absl::Duration took,
             int64_t kv_bytes, const absl::Status& status) {
  process::LogFields fields = {{"id", wire::ShownId(work.id)},
                               {"deliver_to", work.deliver_to.address()},
                               {"total_ms", Milliseconds(took)},
                               {"kv_bytes", kv_bytes}};
  AddSpan(span, took, fields);
  if (!status.ok()) fields.emplace_back("status", Shown(status));
  process::LogEvent(status.ok() ? process::LogLevel::kInfo : process::LogLevel::kWarning, "push",
                    fields);
}

void LogLane(PrefillJob& job, uint32_t lane, const std::string& peer, absl::Time began,
             std::optional<int64_t> from_frame, const absl::Status& end) {
  const PrefillWork& work = job.work();
  if (!work.caller.trace.is_recorded()) return;
  const absl::Duration took = absl::Now() - began;
  process::LogFields fields = {{"id", wire::ShownId(work.id)},
                               {"receiver", int64_t{work.receiver}},
                               {"lane", int64_t{lane}},
                               {"total_ms", Milliseconds(took)},
                               {"frames", job.delivery().sent().frames_per_lane[lane]},
                               {"peer", peer}};
  if (from_frame.has_value()) fields.emplace_back("from_frame", *from_frame);
  AddSpan(work.caller.trace.Child(), took, fields);
  if (!end.ok()) fields.emplace_back("status", Shown(end));
  process::LogEvent(process::LogLevel::kInfo, "lane", fields);
}

void LogCacheWatch(const Caller& caller, int64_t updates, const absl::Status& end) {
  const absl::Duration took = absl::Now() - caller.arrived_at;
  process::LogFields fields = {{"updates", updates}, {"total_ms", Milliseconds(took)}};
  AddCaller(caller, fields);
  AddSpan(caller.trace, took, fields);
  fields.emplace_back("status", Shown(end));
  process::LogEvent(process::LogLevel::kInfo, "cache_watch", fields);
}

void LogRefused(const std::string& request_id, const Caller& caller, Outcome outcome,
                const absl::Status& status) {
  process::LogFields fields = {{"id", wire::ShownId(request_id)},
                               {"outcome", Name(outcome)},
                               {"cause", Name(CauseOf(status))}};
  AddRefusal(caller, status, fields);
  process::LogEvent(process::LogLevel::kWarning, "request", fields);
}

void LogRefusedCall(const char* method, const std::string& request_id, const Caller& caller,
                    const absl::Status& status) {
  process::LogFields fields = {{"method", method}, {"cause", Name(CauseOf(status))}};
  if (!request_id.empty()) fields.emplace_back("id", wire::ShownId(request_id));
  AddRefusal(caller, status, fields);
  process::LogEvent(process::LogLevel::kWarning, "refused", fields);
}

}  // namespace prefilld::server
