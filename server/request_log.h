// Writes the log lines of requests, and of parts of them, that are over. deploy/security.md says
// how a collector makes spans of them.
#ifndef PREFILLD_SERVER_REQUEST_LOG_H_
#define PREFILLD_SERVER_REQUEST_LOG_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/prefill_job.h"

namespace prefilld::server {

void LogRequest(PrefillJob& job, absl::Time now);
void LogReceiver(PrefillJob& receiver, absl::Time now);  // a further one, of a request
// The call to a receiver, within `span`, which has just ended.
void LogPush(const PrefillWork& work, const wire::TraceContext& span, absl::Duration took,
             int64_t kv_bytes, const absl::Status& status);
// A stream that was attached to a request, in place of a broken one if `from_frame` is set, and is
// over. Does nothing unless the request's caller records the trace, to which this adds a span.
void LogLane(PrefillJob& job, uint32_t lane, const std::string& peer, absl::Time began,
             std::optional<int64_t> from_frame, const absl::Status& end);
// A call that followed the prefix cache until now.
void LogCacheWatch(const Caller& caller, int64_t updates, const absl::Status& end);
// A request that was refused, or a further receiver.
void LogRefused(const std::string& request_id, const Caller& caller, Outcome outcome,
                const absl::Status& status);
// Any other call that was refused. `request_id` names the request that it was about.
void LogRefusedCall(const char* method, const std::string& request_id, const Caller& caller,
                    const absl::Status& status);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_REQUEST_LOG_H_
