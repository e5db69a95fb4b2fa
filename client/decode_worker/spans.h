// The spans of a decode worker's calls, in the traces of their callers.
#ifndef PREFILLD_CLIENT_DECODE_WORKER_SPANS_H_
#define PREFILLD_CLIENT_DECODE_WORKER_SPANS_H_

#include "absl/time/time.h"
#include "proto/process/log.h"
#include "proto/wire/trace_context.h"

namespace grpc {
class ServerContextBase;
}  // namespace grpc

namespace prefilld::client {

class WorkerMetrics;

// Takes the trace of a call, and counts a trace context that is not valid.
wire::TraceContext TakeTrace(const grpc::ServerContextBase& call, WorkerMetrics& metrics);

// Adds the fields of a log line by which a collector makes a span of it; total_ms is another one.
void AddSpan(const wire::TraceContext& trace, absl::Time start, process::LogFields& fields);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_DECODE_WORKER_SPANS_H_
