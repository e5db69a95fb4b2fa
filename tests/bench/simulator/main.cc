// prefill-simulator answers how a server would do under a load, without one: its scheduler runs
// over the trace by a clock that jumps, and layers take the times that were measured on a real
// server.
//
//   prefill-simulator --profile=profile.json --trace=requests.csv [--scheduling=fifo]
//
// It prints what `prefill-cli bench --json` prints.
#include <cstdio>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/str_cat.h"
#include "client/cli/load_report.h"
#include "client/cli/load_trace.h"
#include "model/prefill/prefill_engine.h"
#include "model/sparse/attention_options.h"
#include "nlohmann/json.hpp"
#include "proto/process/command_line.h"
#include "proto/process/problems.h"
#include "proto/status_macros.h"
#include "spdlog/spdlog.h"
#include "tests/bench/simulator/server_profile.h"
#include "tests/bench/simulator/simulation.h"

ABSL_FLAG(std::string, profile, "", "File that tests/bench/measure_layers.py wrote. Required.");
ABSL_FLAG(std::string, trace, "", "CSV file of requests, as for prefill-cli bench. Required.");
ABSL_FLAG(double, rate, 0, "Requests a second, as a Poisson process. 0: when the trace says.");
ABSL_FLAG(double, speedup, 1, "Requests come so many times as fast.");
ABSL_FLAG(int64_t, num_requests, 0, "As for prefill-cli bench.");
ABSL_FLAG(uint64_t, seed, 0, "Seed of arrivals and tokens.");
ABSL_FLAG(std::string, scheduling, "turns", "turns or fifo, as for prefilld.");
ABSL_FLAG(std::string, policy, "auto", "Attention of all requests.");
ABSL_FLAG(int64_t, queue_capacity, 64, "As for prefilld.");
ABSL_FLAG(int64_t, max_queued_tokens, 0, "As for prefilld.");
ABSL_FLAG(std::string, tenants, "", "As for prefilld; then the trace's tenants count.");
ABSL_FLAG(int64_t, prefix_cache_bytes, 0, "As for prefilld.");
ABSL_FLAG(bool, json, false, "Print one JSON object.");
ABSL_FLAG(bool, each, false, "With --json: list every request, too.");

namespace prefilld::bench {
namespace {

absl::StatusOr<SimulationOptions> ReadOptions() {
  process::Problems problems;
  SimulationOptions options;
  const std::string scheduling = absl::GetFlag(FLAGS_scheduling);
  if (scheduling != "turns" && scheduling != "fifo") {
    problems.push_back(absl::StrCat("--scheduling=", scheduling, " is not one of turns, fifo"));
  }
  if (scheduling == "fifo") options.scheduling = server::Scheduling::kFifo;
  const std::string policy = absl::GetFlag(FLAGS_policy);
  if (const auto known = model::ParsePolicy(policy); known.has_value()) {
    options.policy = *known;
  } else {
    problems.push_back(
        absl::StrCat("--policy=", policy, " is not one of ", model::AllPolicyNames()));
  }
  options.queue_capacity = absl::GetFlag(FLAGS_queue_capacity);
  options.max_queued_tokens = absl::GetFlag(FLAGS_max_queued_tokens);
  options.prefix_cache_bytes = absl::GetFlag(FLAGS_prefix_cache_bytes);
  options.seed = absl::GetFlag(FLAGS_seed);
  process::CheckRange("--queue_capacity", options.queue_capacity, 0, 1 << 20, problems);
  process::CheckRange("--max_queued_tokens", options.max_queued_tokens, 0, int64_t{1} << 36,
                      problems);
  process::CheckRange("--prefix_cache_bytes", options.prefix_cache_bytes, 0,
                      model::kMaxPrefixCacheBytes, problems);
  process::CheckRange("--num_requests", absl::GetFlag(FLAGS_num_requests), 0,
                      client::kMaxLoadRequests, problems);
  if (!(absl::GetFlag(FLAGS_rate) >= 0)) problems.push_back("--rate must not be negative");
  if (!(absl::GetFlag(FLAGS_speedup) > 0)) problems.push_back("--speedup must be above 0");
  if (const std::string path = absl::GetFlag(FLAGS_tenants); !path.empty()) {
    options.has_tenants = true;
    auto tenants = server::Tenants::Read(path, server::Strangers::kDefaultTenant);
    if (tenants.ok()) {
      options.tenants = *std::move(tenants);
    } else {
      problems.push_back(absl::StrCat("--tenants: ", tenants.status().message()));
    }
  }
  PREFILLD_RETURN_IF_ERROR(process::ToStatus(problems));
  return options;
}

absl::StatusOr<std::vector<client::LoadRequest>> ReadLoad() {
  PREFILLD_ASSIGN_OR_RETURN(auto requests, client::ReadTrace(absl::GetFlag(FLAGS_trace)));
  return client::ShapeLoad(std::move(requests), {.rate = absl::GetFlag(FLAGS_rate),
                                                 .speedup = absl::GetFlag(FLAGS_speedup),
                                                 .num_requests = absl::GetFlag(FLAGS_num_requests),
                                                 .seed = absl::GetFlag(FLAGS_seed)});
}

absl::Status Run() {
  PREFILLD_ASSIGN_OR_RETURN(const SimulationOptions options, ReadOptions());
  PREFILLD_ASSIGN_OR_RETURN(const ServerProfile profile, ReadProfile(absl::GetFlag(FLAGS_profile)));
  PREFILLD_ASSIGN_OR_RETURN(const auto requests, ReadLoad());
  PREFILLD_ASSIGN_OR_RETURN(const auto ends, Simulate(profile, requests, options));
  nlohmann::json report = client::LoadReport(ends, client::LoadSender());
  if (absl::GetFlag(FLAGS_each)) report["each"] = client::EachRequest(ends);
  std::printf("%s", absl::GetFlag(FLAGS_json) ? absl::StrCat(report.dump(2), "\n").c_str()
                                              : client::LoadSummary(report).c_str());
  return absl::OkStatus();
}

}  // namespace
}  // namespace prefilld::bench

int main(int argc, char** argv) {
  prefilld::process::ParseCommandLine(
      argc, argv,
      {.usage = "How a server would do under a load. prefill-simulator --profile=FILE --trace=FILE",
       .groups = {{"Load", {"trace", "rate", "speedup", "num_requests", "seed", "policy"}},
                  {"Server",
                   {"profile", "scheduling", "queue_capacity", "max_queued_tokens", "tenants",
                    "prefix_cache_bytes"}},
                  {"Output", {"json", "each"}}}});
  spdlog::set_level(spdlog::level::warn);
  const absl::Status status = prefilld::bench::Run();
  if (status.ok()) return 0;
  std::fprintf(stderr, "prefill-simulator: %s\n", std::string(status.message()).c_str());
  return absl::IsInvalidArgument(status) ? 2 : 1;
}
