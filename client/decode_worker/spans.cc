#include "client/decode_worker/spans.h"

#include <utility>

#include "client/decode_worker/metrics.h"

namespace prefilld::client {

wire::TraceContext TakeTrace(const grpc::ServerContextBase& call, WorkerMetrics& metrics) {
  wire::TakenTrace taken = wire::TakeTrace(call);
  if (taken.ignored) metrics.CountIgnoredTrace();
  return std::move(taken.context);
}

void AddSpan(const wire::TraceContext& trace, absl::Time start, process::LogFields& fields) {
  fields.emplace_back("trace_id", trace.trace_id);
  fields.emplace_back("span_id", trace.span_id);
  if (!trace.parent_span_id.empty()) fields.emplace_back("parent_span_id", trace.parent_span_id);
  fields.emplace_back("start_unix_ns", absl::ToUnixNanos(start));
}

}  // namespace prefilld::client
