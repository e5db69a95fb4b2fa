// Timing several ways to compute the same thing, to keep the fastest.
//
// Rivals take turns, a round each, since the clock falls while a GPU warms up; the first round is
// the warm-up.
#ifndef PREFILLD_KERNELS_CUDA_RIVALS_H_
#define PREFILLD_KERNELS_CUDA_RIVALS_H_

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <vector>

namespace prefilld::kernels::cuda {

inline constexpr int kTuneRounds = 6;

// How often a matrix product is repeated within a round: for as long as a GPU takes for some TFLOP,
// about 10 ms, but not without end where launching takes longer than computing.
int TuneRepetitions(int64_t num_tokens, int64_t in_features, int64_t out_features);

// Time that `repetitions` of the launch take on the stream; waits for them.
cublasStatus_t TimeLaunches(const std::function<cublasStatus_t()>& launch, int repetitions,
                            cudaStream_t stream, float* ms);

// Of the rounds after the warm-up; `ms` is not empty.
float MedianMs(std::vector<float> ms);

// What is fastest for a product is so for other numbers of tokens too, until they become few.
constexpr bool TuningHolds(int64_t tuned_tokens, int64_t num_tokens) {
  return num_tokens >= tuned_tokens / 4;
}

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_RIVALS_H_
