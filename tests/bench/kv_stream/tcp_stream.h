// The ceiling for KV streams: the same bytes over bare TCP connections on loopback, neither framed
// nor checked.
#ifndef PREFILLD_TESTS_BENCH_KV_STREAM_TCP_STREAM_H_
#define PREFILLD_TESTS_BENCH_KV_STREAM_TCP_STREAM_H_

#include <cstdint>

#include "absl/status/statusor.h"

namespace prefilld::bench {

// Returns the seconds that `total_bytes` take over `connections` connections. Each has a sending
// and a receiving thread and writes pieces of `chunk_bytes` from memory that is not cached.
absl::StatusOr<double> StreamOverTcp(int64_t total_bytes, int connections, int64_t chunk_bytes);

}  // namespace prefilld::bench

#endif  // PREFILLD_TESTS_BENCH_KV_STREAM_TCP_STREAM_H_
