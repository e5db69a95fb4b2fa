// The requests of a load, before they are sent: read from a trace, or made up.
#ifndef PREFILLD_CLIENT_CLI_LOAD_TRACE_H_
#define PREFILLD_CLIENT_CLI_LOAD_TRACE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace prefilld::client {

struct LoadRequest {
  absl::Duration arrival = absl::ZeroDuration();  // since the load began
  int64_t num_tokens = 0;
  // The first prefix_tokens are those of every request with this prefix. Empty: there are none.
  std::string prefix = {};
  int64_t prefix_tokens = 0;
  std::string tenant = {};  // empty: the caller does not say
  int priority = 0;
};

// The limits of a trace.
inline constexpr size_t kMaxLoadRequests = 1'000'000;
inline constexpr int64_t kMaxLoadTokens = int64_t{1} << 24;  // of a request

// Reads a trace in CSV. Lines that begin with # are comments. The first other line names the
// columns, in any order: arrival_s and tokens, and perhaps prefix, prefix_tokens, tenant and
// priority. Fields are not quoted, and an empty one is absent. Arrivals do not decrease.
// INVALID_ARGUMENT names line, field, value and limit.
absl::StatusOr<std::vector<LoadRequest>> ParseTrace(absl::string_view csv);
// Reads the file. INVALID_ARGUMENT names it, and the reason.
absl::StatusOr<std::vector<LoadRequest>> ReadTrace(const std::string& path);

// Makes `count` requests whose arrivals are a Poisson process of `per_second` on average. They take
// the lengths, prefixes, tenants and classes of `shapes` in turn, over and over.
std::vector<LoadRequest> PoissonLoad(const std::vector<LoadRequest>& shapes, double per_second,
                                     size_t count, uint64_t seed);

struct LoadShape {
  double rate = 0;           // of PoissonLoad; 0: arrivals stay
  double speedup = 1;        // arrivals are divided by it
  int64_t num_requests = 0;  // 0: as many as there are; with a rate there may be more
  uint64_t seed = 0;         // of arrivals
};
// Makes the load that is wanted of a trace.
std::vector<LoadRequest> ShapeLoad(std::vector<LoadRequest> trace, const LoadShape& shape);

// Makes the tokens of request `index`, below `vocab_size`, the same for the same seed. Those that
// are not of a shared prefix are this index's alone.
std::vector<uint32_t> TokensOf(const LoadRequest& request, size_t index, uint64_t seed,
                               uint32_t vocab_size);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_CLI_LOAD_TRACE_H_
