// Writes the log line of a request that is over.
#ifndef PREFILLD_SERVER_REQUEST_LOG_H_
#define PREFILLD_SERVER_REQUEST_LOG_H_

#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/prefill_job.h"

namespace prefilld::server {

void LogRequest(PrefillJob& job, absl::Time now);
void LogReceiver(PrefillJob& receiver, absl::Time now);  // a further one, of a request
void LogRefused(const std::string& request_id, const std::string& peer, Outcome outcome,
                const absl::Status& status);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_REQUEST_LOG_H_
