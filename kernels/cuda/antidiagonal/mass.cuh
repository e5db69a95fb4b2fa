// The end of a row of antidiagonal scores, for either path: from weights in scratch memory to block
// mass.
#ifndef PREFILLD_KERNELS_CUDA_ANTIDIAGONAL_MASS_CUH_
#define PREFILLD_KERNELS_CUDA_ANTIDIAGONAL_MASS_CUH_

#include <cuda_runtime.h>

#include "kernels/cuda/antidiagonal/plan.h"
#include "kernels/cuda/device/arithmetic.cuh"

namespace prefilld::kernels::cuda {

// Whether a fold has a query of the call.
__device__ __forceinline__ bool has_query(const FoldLaunch& launch, int fold) {
  return fold >= launch.first_query_fold && fold < launch.num_folds;
}

// Writes the block mass of the query blocks of kPerBlock folds that a group of four warps has
// computed. The group's folds begin at `first_fold`, a multiple of kGroupFolds, and its query
// blocks belong to the head whose block mass begins at `out`.
// - weights[block * kGroupFolds + fold] is log2 of the sum of the exponentials of the fold on the
//   block, -infinity where it sees none of it.
// - log_sums[fold], in shared memory, is log2 of the sum over all blocks; +infinity for folds
//   without a query, which then have no weight.
// `thread` is 0 .. 127. The caller has waited for the other threads' weights and log-sums.
template <int kPerBlock>
__device__ __forceinline__ void write_mass(const FoldLaunch& launch, const float* weights,
                                           const float* log_sums, int first_fold, float* out,
                                           int thread) {
  // A lane reads two folds. So many lanes share a query block; each of them ends up with one of as
  // many key blocks.
  constexpr int kLanes = kPerBlock / 2;
  const int lane = thread % 32;
  const float2 log_sum = reinterpret_cast<const float2*>(log_sums)[lane];
  const auto* lane_weights = reinterpret_cast<const float2*>(weights) + lane;
  const int row = first_fold / kPerBlock + lane / kLanes;  // by absolute position
  const int first = max(row * kPerBlock, launch.first_query_fold);
  const int end = min((row + 1) * kPerBlock, launch.num_folds);
  const float inverse = 1.0f / static_cast<float>(max(end - first, 1));
  float* out_row =
      out + static_cast<int64_t>(row - launch.first_query_block) * launch.num_key_blocks;
  const int last_block = min((first_fold + kGroupFolds - 1) / kPerBlock, launch.num_key_blocks - 1);
#pragma unroll 2
  for (int block = thread / 32 * kLanes; block <= last_block; block += 4 * kLanes) {
    float mass[kLanes];
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      // The weights are read once and must not displace queries and keys in L2.
      const float2 weight = __ldcs(lane_weights + static_cast<int64_t>(min(block + j, last_block)) *
                                                      (kGroupFolds / 2));
      mass[j] =
          device::exp2_approx(weight.x - log_sum.x) + device::exp2_approx(weight.y - log_sum.y);
    }
    const float total = device::warp_sums<kLanes, kLanes>(mass);
    const int column = block + lane % kLanes;
    if (first < end && column <= row) out_row[column] = total * inverse;
  }
}

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_ANTIDIAGONAL_MASS_CUH_
