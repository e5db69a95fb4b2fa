#include "client/cli/bench_options.h"

#include "absl/flags/flag.h"
#include "absl/strings/str_cat.h"
#include "client/cli/load_trace.h"
#include "proto/wire/host_port.h"

ABSL_FLAG(std::string, trace, "",
          "bench: CSV file of requests: arrival_s, tokens, and perhaps prefix, prefix_tokens, "
          "tenant, priority. Empty: --prompt_tokens and --rate say what is sent.");
ABSL_FLAG(int64_t, prompt_tokens, 512, "bench: random tokens of a request without a trace.");
ABSL_FLAG(double, rate, 0,
          "bench: requests a second, as a Poisson process. 0: when the trace says.");
ABSL_FLAG(double, speedup, 1, "bench: requests come so many times as fast.");
ABSL_FLAG(int64_t, num_requests, 0,
          "bench: requests to send; with --rate the trace is used over and over. 0: one for each "
          "line of the trace.");
ABSL_FLAG(int64_t, last_blocks, -1,
          "bench: KV blocks at the end of each prompt that are asked for. -1: all.");
ABSL_FLAG(int64_t, max_in_flight, 512,
          "bench: requests under way at a time; more are sent late, which is reported.");
ABSL_FLAG(bool, each, false, "bench: with --json, list the time of every request, too.");
ABSL_FLAG(std::string, tenant_key, "x-tenant",
          "bench: key of the metadata that names a request's tenant.");

ABSL_FLAG(std::string, peer, "", "bench-kv: host:port of the server's --kv_bench_listen.");
ABSL_FLAG(int64_t, transfer_mb, 2000,
          "bench-kv: MB of KV in one transfer; as much memory is used.");
ABSL_FLAG(int32_t, runs, 5, "bench-kv: transfers of each kind, of which the median is told.");

namespace prefilld::client {

BenchOptions ReadLoad(bool is_wanted, process::Problems& problems) {
  BenchOptions bench;
  bench.trace = absl::GetFlag(FLAGS_trace);
  bench.prompt_tokens = absl::GetFlag(FLAGS_prompt_tokens);
  bench.rate = absl::GetFlag(FLAGS_rate);
  bench.speedup = absl::GetFlag(FLAGS_speedup);
  bench.num_requests = absl::GetFlag(FLAGS_num_requests);
  bench.last_blocks = absl::GetFlag(FLAGS_last_blocks);
  bench.max_in_flight = absl::GetFlag(FLAGS_max_in_flight);
  bench.each = absl::GetFlag(FLAGS_each);
  bench.tenant_key = absl::GetFlag(FLAGS_tenant_key);
  process::CheckRange("--prompt_tokens", bench.prompt_tokens, 1, kMaxLoadTokens, problems);
  if (!(bench.rate >= 0 && bench.rate <= 1e5)) problems.push_back("--rate is outside 0 to 100000");
  if (!(bench.speedup > 0 && bench.speedup <= 1e6)) {
    problems.push_back("--speedup must be above 0, and at most 1000000");
  }
  process::CheckRange("--num_requests", bench.num_requests, 0, kMaxLoadRequests, problems);
  process::CheckRange("--last_blocks", bench.last_blocks, -1, kMaxLoadTokens, problems);
  process::CheckRange("--max_in_flight", bench.max_in_flight, 1, 65536, problems);
  const bool says_how_many = bench.rate > 0 && bench.num_requests > 0;
  if (is_wanted && bench.trace.empty() && !says_how_many) {
    problems.push_back("bench needs --trace, or --rate and --num_requests");
  }
  return bench;
}

KvBenchOptions ReadKvBench(bool is_wanted, process::Problems& problems) {
  KvBenchOptions bench;
  bench.peer = absl::GetFlag(FLAGS_peer);
  bench.transfer_mb = absl::GetFlag(FLAGS_transfer_mb);
  bench.runs = absl::GetFlag(FLAGS_runs);
  process::CheckRange("--transfer_mb", bench.transfer_mb, 1, 1 << 20, problems);
  process::CheckRange("--runs", bench.runs, 1, 1000, problems);
  if (is_wanted && bench.peer.empty()) problems.push_back("bench-kv needs --peer");
  if (!bench.peer.empty()) {
    process::AddIfAny(wire::DialAddressProblem("--peer", bench.peer), problems);
  }
  return bench;
}

std::vector<const char*> LoadFlags() {
  return {"trace",       "prompt_tokens", "rate", "speedup",   "num_requests",
          "last_blocks", "max_in_flight", "each", "tenant_key"};
}

std::vector<const char*> KvBenchFlags() { return {"peer", "transfer_mb", "runs"}; }

}  // namespace prefilld::client
