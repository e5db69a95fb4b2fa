// Times several ways to compute the same thing, to keep the fastest.
//
// The candidates take turns, each once a round, since the clock falls while a GPU warms up. The
// first round is the warm-up.
#ifndef PREFILLD_KERNELS_CUDA_TUNING_H_
#define PREFILLD_KERNELS_CUDA_TUNING_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/cuda/launch_status.h"

namespace prefilld::kernels::cuda {

inline constexpr int kTuneRounds = 6;

// One way to compute it, and the time that it took in each round.
template <typename Way>
struct Candidate {
  Way way;
  std::vector<float> ms;
};

// The number of times that a matrix product is repeated within a round: enough to keep a GPU busy
// for about 10 ms, but limited where launching takes longer than computing.
int TuneRepetitions(int64_t num_tokens, int64_t in_features, int64_t out_features);

// Measures the time that `repetitions` of the launch take on the stream; waits for them.
LaunchStatus TimeLaunches(const std::function<LaunchStatus()>& launch, int repetitions,
                          cudaStream_t stream, float* ms);

// The median over the rounds after the warm-up. `ms` is not empty.
float MedianMs(std::vector<float> ms);

// Whether a choice made for `tuned_tokens` is used for `num_tokens`. The fastest way to compute a
// product stays the fastest for other numbers of tokens, until they become few.
constexpr bool TuningHolds(int64_t tuned_tokens, int64_t num_tokens) {
  return num_tokens >= tuned_tokens / 4;
}

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_TUNING_H_
