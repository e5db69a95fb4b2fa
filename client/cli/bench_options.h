// The flags of the commands bench and bench-kv.
#ifndef PREFILLD_CLIENT_CLI_BENCH_OPTIONS_H_
#define PREFILLD_CLIENT_CLI_BENCH_OPTIONS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "proto/process/problems.h"

namespace prefilld::client {

// The load of the command bench.
struct BenchOptions {
  std::string trace;            // a file; empty: requests of prompt_tokens
  int64_t prompt_tokens = 512;  // of each request when there is no trace
  double rate = 0;              // of a Poisson process; 0: requests come when the trace says
  double speedup = 1;
  int64_t num_requests = 0;  // 0: as many as the trace has
  int64_t last_blocks = -1;
  int64_t max_in_flight = 512;
  bool each = false;  // the JSON lists every request
  std::string tenant_key = "x-tenant";
};

// The transfers of the command bench-kv.
struct KvBenchOptions {
  std::string peer;                         // host:port of the server's --kv_bench_listen
  int64_t transfer_mb = 2000;               // KV of one transfer
  int runs = 5;                             // of each kind
  std::vector<uint32_t> lanes = {1, 4, 8};  // to measure one after the other
};

// These read the flags as they are set now. Those that only one command needs must be given if it
// is wanted.
BenchOptions ReadLoad(bool is_wanted, process::Problems& problems);
KvBenchOptions ReadKvBench(bool is_wanted, process::Problems& problems);

// The names of the flags, for --help.
std::vector<const char*> LoadFlags();
std::vector<const char*> KvBenchFlags();

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_CLI_BENCH_OPTIONS_H_
