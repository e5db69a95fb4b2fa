// The benchmarks. Each function adds its rows to the report.
#ifndef PREFILLD_TESTS_BENCH_DEVICE_BENCHES_H_
#define PREFILLD_TESTS_BENCH_DEVICE_BENCHES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "model/device/device.h"
#include "model/prefill/prefill_engine.h"
#include "model/sparse/attention_options.h"
#include "tests/bench/device/attention_data.h"
#include "tests/bench/device/report.h"

namespace prefilld::bench {

// Measures attention alone: dense, dense with the block mass of every head, and random patterns of
// the densities (percent). `vs_linear` is the time over density * dense time. `error` is that of
// some queries against the host (attention_check.h); an error that is too large ends the run.
absl::Status BenchAttention(model::Device& device, const AttentionData& data,
                            const std::vector<int>& densities, int runs, Report* report);

// Measures antidiagonal scores of all heads with this stride, and the choice of blocks by them. The
// row `worst_sum` is the greatest distance from 1 of the sum of a row of the block mass; a distance
// above 1e-3 ends the run.
absl::Status BenchScores(model::Device& device, const AttentionData& data, int stride, int runs,
                         Report* report);

// Measures the packing of K and V of one layer into frames of 2 MiB of 16-token blocks, as every
// type of the wire, by so many threads at once: alone, and while dense attention over `data` runs.
absl::Status BenchPack(model::Device& device, const AttentionData& data,
                       const std::vector<int64_t>& threads, int runs, Report* report);

// Measures all that pattern sharing does for one layer, from the estimate to the output: a layer
// that makes its pivots, and a later one whose pivots exist, both on `data`. `clusters_path` names
// heads of layers 0 and 1. `error` is ||out - dense|| / ||dense|| over all heads.
absl::Status BenchSharing(model::Device& device, AttentionData& data,
                          const std::string& clusters_path, const model::AttentionOptions& options,
                          int runs, Report* report);

struct LayerShape {
  int64_t hidden = 3584;
  int64_t intermediate = 18944;
  int num_heads = 28;
  int num_kv_heads = 4;
  int head_dim = 128;
};

// Measures the ops of a layer other than attention, each alone, over `num_tokens` tokens.
absl::Status BenchLayerOps(model::Device& device, const LayerShape& shape, int64_t num_tokens,
                           int runs, Report* report);

// Measures the linear layers of a whole prefill back to back, in tiles of tokens: the time of the
// library's matrix products alone, at the clock that so long a run leaves the card. `device` uses
// the algorithms that the library chooses; `tuned`, opened on the same hardware, uses those that
// are fastest for a whole tile. The two take turns. Then gate, up and SwiGLU of a tile are measured
// as two ops and as one.
absl::Status BenchLinears(model::Device& device, model::Device& tuned, const LayerShape& shape,
                          int num_layers, int64_t num_tokens, int64_t tile_tokens, Report* report);

// Measures whole prefills of a prompt. The settings take turns, run by run. The KV is released
// unread.
absl::Status BenchPrefill(model::PrefillEngine& engine, const std::vector<uint32_t>& tokens,
                          const std::vector<model::AttentionOptions>& settings, bool warm_up,
                          int runs, Report* report);

// Measures a batch of `num_prompts` dense prompts in one pass, in turns with the same prompts one
// by one. The KV is released unread.
absl::Status BenchBatch(model::PrefillEngine& engine, const std::vector<uint32_t>& tokens,
                        int num_prompts, int runs, Report* report);

}  // namespace prefilld::bench

#endif  // PREFILLD_TESTS_BENCH_DEVICE_BENCHES_H_
