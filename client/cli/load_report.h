// How the requests of a load ended, and what the times of all of them come to.
#ifndef PREFILLD_CLIENT_CLI_LOAD_REPORT_H_
#define PREFILLD_CLIENT_CLI_LOAD_REPORT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "client/cli/load_trace.h"
#include "nlohmann/json_fwd.hpp"

namespace prefilld::client {

// The end of one request. Times count from the moment at which it was due, not from the one at
// which it was sent: if the sender was late, that is part of what its caller waited for.
struct LoadEnd {
  LoadRequest request;
  absl::StatusCode code = absl::StatusCode::kOk;
  absl::Duration late;  // it was sent
  absl::Duration ended;
  // Those that came. The server had the first token after `first_token`, and it was here with the
  // result after `result`.
  std::optional<absl::Duration> first_token, last_block, result;
  int64_t cached_tokens = 0;
  int64_t kv_bytes = 0;
};

// Whoever sent the requests.
struct LoadSender {
  int64_t max_in_flight = 0;
  int64_t most_in_flight = 0;  // at any time
  int64_t held_back = 0;       // requests that were due when so many were in flight
};

// The value that a share of the values, 0 to 1, does not exceed: the nearest rank. `sorted` ascends
// and is not empty.
double Percentile(const std::vector<double>& sorted, double share);

// Makes one object: ends by status, rates, percentiles of the times in milliseconds, over all
// requests and by length, tenant and class, and how late the sender was.
nlohmann::json LoadReport(const std::vector<LoadEnd>& ends, const LoadSender& sender);

// Lists every request: its tokens, and the milliseconds to its first token, or null.
nlohmann::json EachRequest(const std::vector<LoadEnd>& ends);

// Says the same in a few lines, for people.
std::string LoadSummary(const nlohmann::json& report);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_CLI_LOAD_REPORT_H_
