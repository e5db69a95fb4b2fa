// Sends the requests of a load to a server at their times, whatever the server does with them.
#ifndef PREFILLD_CLIENT_CLI_LOAD_RUN_H_
#define PREFILLD_CLIENT_CLI_LOAD_RUN_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "client/cancellation.h"
#include "client/cli/load_report.h"
#include "client/cli/load_trace.h"
#include "client/prefill_client.h"
#include "prefill/v1/prefill.pb.h"

namespace prefilld::client {

struct LoadOptions {
  // All that requests have in common. Tokens, class and the first block are each request's own.
  ::prefill::v1::PrefillRequest request;
  // KV blocks at the end of its prompt that each request asks for; -1: all.
  int64_t last_blocks = -1;
  Metadata metadata;
  std::string tenant_key = "x-tenant";  // of the metadata that names a request's tenant
  absl::Duration timeout = absl::InfiniteDuration();  // of a request, from when it is sent
  // Requests in flight at a time. Another one that is due waits for the end of one of them, which
  // counts as late.
  int64_t max_in_flight = 512;
  uint64_t seed = 0;
  uint32_t vocab_size = 0;
};

// The state of a load under way, for whoever watches.
struct LoadProgress {
  absl::Duration time;  // since it began
  size_t requests = 0;
  size_t sent = 0;
  size_t in_flight = 0;
  size_t failed = 0;
  double first_token_p50_ms = 0, first_token_p99_ms = 0;  // so far; 0: none yet
};

struct LoadOutcome {
  std::vector<LoadEnd> ends;  // of all requests, unless the load was cancelled
  LoadSender sender;
};

// Returns when every request has ended. The calls take the clients in turn, each of which has a
// connection of its own. No call has a thread: one thread sends, and gRPC's threads read, verify
// and drop what comes. A cancellation ends those under way, and no more are sent. `watch` is called
// once a second. INVALID_ARGUMENT: the metadata is not what gRPC carries.
absl::StatusOr<LoadOutcome> RunLoad(const std::vector<LoadRequest>& requests,
                                    absl::Span<const std::unique_ptr<PrefillClient>> clients,
                                    const LoadOptions& options, const Cancellation& cancellation,
                                    absl::FunctionRef<void(const LoadProgress&)> watch);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_CLI_LOAD_RUN_H_
