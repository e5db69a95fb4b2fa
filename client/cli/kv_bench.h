// How fast the KV plane is between this process and a prefilld that makes its KV up.
#ifndef PREFILLD_CLIENT_CLI_KV_BENCH_H_
#define PREFILLD_CLIENT_CLI_KV_BENCH_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/cancellation.h"
#include "client/prefill_client.h"
#include "nlohmann/json_fwd.hpp"

namespace prefilld::client {

// Some bytes on their way, and what they cost the two processes.
struct MeasuredTransfer {
  int64_t bytes = 0;
  double seconds = 0.0;
  double cpu_s_here = 0.0, cpu_s_there = 0.0;
  int64_t page_faults_here = 0, page_faults_there = 0;
};

// All transfers over a number of lanes, and as many of the same size over so many bare connections.
struct MeasuredLanes {
  uint32_t lanes = 0;
  std::string transport;  // "grpc", or "shared" for shared memory
  std::vector<MeasuredTransfer> kv = {};
  std::vector<MeasuredTransfer> tcp = {};
};

// Fetches KV of about `bytes` over each number of lanes `runs` times, in shared memory as well
// where that can be reached, in turns with bare TCP to `peer`, after one transfer each that does
// not count. Each frame is verified, and its blocks are copied to places of their own in memory, as
// a decode worker does. FAILED_PRECONDITION: the server has a model, so that its computation would
// be measured.
absl::StatusOr<std::vector<MeasuredLanes>> MeasureKv(PrefillClient& client, const std::string& peer,
                                                     int64_t bytes, int runs,
                                                     const std::vector<uint32_t>& lanes,
                                                     const PrefillCallOptions& options);

// Makes one object of the medians: GB/s, processor seconds a GB and page faults a MB of both ends.
nlohmann::json KvBenchReport(const std::vector<MeasuredLanes>& rows);

// Says the same as a table, for people.
std::string KvBenchTable(const nlohmann::json& report);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_CLI_KV_BENCH_H_
