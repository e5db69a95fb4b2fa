// Sends a load through the server's own scheduler, by a clock that jumps.
#ifndef PREFILLD_TESTS_BENCH_SIMULATOR_SIMULATION_H_
#define PREFILLD_TESTS_BENCH_SIMULATOR_SIMULATION_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "client/cli/load_report.h"
#include "client/cli/load_trace.h"
#include "model/sparse/attention_policy.h"
#include "server/admission.h"
#include "server/tenants.h"
#include "server/turns.h"
#include "tests/bench/simulator/server_profile.h"

namespace prefilld::bench {

struct SimulationOptions {
  server::Scheduling scheduling = server::Scheduling::kTurns;
  int64_t queue_capacity = 64;
  int64_t max_queued_tokens = 0;  // 0: eight prompts of the greatest length
  server::Tenants tenants = {};
  bool has_tenants = false;  // otherwise tenants' names do not count
  model::AttentionPolicy policy = model::AttentionPolicy::kAuto;
  int64_t prefix_cache_bytes = 0;
  uint64_t seed = 0;  // of the tokens
};

// Returns how every request ends. Admission, batches, turns, tenants and the prefix cache's index
// are those of a server; layers take the times of the profile, and KV leaves at once. INTERNAL: the
// scheduler stopped before all requests had ended.
absl::StatusOr<std::vector<client::LoadEnd>> Simulate(
    const ServerProfile& profile, const std::vector<client::LoadRequest>& requests,
    const SimulationOptions& options);

}  // namespace prefilld::bench

#endif  // PREFILLD_TESTS_BENCH_SIMULATOR_SIMULATION_H_
