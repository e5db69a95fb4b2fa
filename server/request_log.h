// Writes the log lines of requests, and of parts of them, that are over. deploy/security.md says
// how a collector makes spans of them.
#ifndef PREFILLD_SERVER_REQUEST_LOG_H_
#define PREFILLD_SERVER_REQUEST_LOG_H_

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
// A call that followed the prefix cache until now.
void LogCacheWatch(const Caller& caller, int64_t updates, const absl::Status& end);
void LogRefused(const std::string& request_id, const Caller& caller, Outcome outcome,
                const absl::Status& status);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_REQUEST_LOG_H_
