// What is kept of a request that is over: one line.
#ifndef PREFILLD_SERVER_REQUEST_LOG_H_
#define PREFILLD_SERVER_REQUEST_LOG_H_

#include <string>

#include "absl/status/status.h"
#include "server/prefill_job.h"

namespace prefilld::server {

void LogRequest(PrefillJob& job);
void LogRefused(const std::string& request_id, const std::string& peer, Outcome outcome,
                const absl::Status& status);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_REQUEST_LOG_H_
