// The times and the sizes of a real server, as tests/bench/measure_layers.py wrote them down.
#ifndef PREFILLD_TESTS_BENCH_SIMULATOR_SERVER_PROFILE_H_
#define PREFILLD_TESTS_BENCH_SIMULATOR_SERVER_PROFILE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "model/sparse/attention_policy.h"

namespace prefilld::bench {

// The times of a prompt that is computed alone.
struct MeasuredPrompt {
  model::AttentionPolicy policy = model::AttentionPolicy::kDense;
  int64_t num_tokens = 0;
  double layer_us = 0;        // of all layers but the last
  double last_layer_us = 0;   // of which only the last query's attention is computed
  double first_token_us = 0;  // behind the last layer
  // The first layer of a prompt as long as none before it, for which the device's libraries find
  // their algorithms.
  double first_layer_us = 0;
};

struct ServerProfile {
  int num_layers = 0;
  int64_t max_tokens = 0;
  int64_t crossover_tokens = 0;   // policy auto shares from here on
  int64_t cache_block_bytes = 0;  // of the prefix cache, for 128 tokens; 0: it has none
  std::vector<int64_t> places;    // the tokens of each prompt that may be under way
  int64_t max_batch_tokens = 0;   // as model::EngineOptions, which also explains the next one
  int64_t interject_tokens = 0;
  // A layer of a long prompt has points between its parts: tiles of so many tokens before and
  // behind attention, and pieces of attention that take at most so long.
  int64_t part_tokens = 0;
  double attention_part_us = 0;
  // The device computes a part while the host is at the point before it, so whoever goes first
  // there waits for that part.
  bool queues_ahead = false;
  double request_us = 0;  // of a request, beside its queue and its computation
  std::vector<MeasuredPrompt> prompts;
};

// INVALID_ARGUMENT names the field.
absl::StatusOr<ServerProfile> ParseProfile(const std::string& json);
// Reads the file. INVALID_ARGUMENT names it, and the reason.
absl::StatusOr<ServerProfile> ReadProfile(const std::string& path);

}  // namespace prefilld::bench

#endif  // PREFILLD_TESTS_BENCH_SIMULATOR_SERVER_PROFILE_H_
