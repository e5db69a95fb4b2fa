// Online softmax over the accumulators of one consumer warpgroup: 64 query rows by 128 keys.
#ifndef PREFILLD_KERNELS_CUDA_ATTENTION_SM90_SOFTMAX_CUH_
#define PREFILLD_KERNELS_CUDA_ATTENTION_SM90_SOFTMAX_CUH_

#include <cmath>

#include "kernels/cuda/device/accumulator.cuh"
#include "kernels/cuda/device/arithmetic.cuh"

namespace prefilld::kernels::cuda::sm90 {

// The running maxima and sums of a thread's two rows. Maxima are scaled to powers of two.
struct Softmax {
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};  // this thread's columns only, until reduced

  // Takes in the logits of one key block and turns them into exp2(logit * scale_log2 - max).
  // Returns in `rescale` the factors that earlier output must be multiplied by, and in `block_sum`
  // this thread's share of the rows' sums over the block.
  __device__ void update(float (&s)[64], float scale_log2, float (&rescale)[2],
                         float (&block_sum)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float m = s[2 * row];
#pragma unroll
      for (int j = 0; j < 16; ++j) m = fmaxf(m, fmaxf(s[4 * j + 2 * row], s[4 * j + 2 * row + 1]));
      const float new_max = fmaxf(max[row], device::quad_max(m) * scale_log2);
      rescale[row] = device::exp2_approx(max[row] - new_max);
      max[row] = new_max;
      float total = 0.0f;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        float& a = s[4 * j + 2 * row];
        float& b = s[4 * j + 2 * row + 1];
        a = device::exp2_approx(fmaf(a, scale_log2, -new_max));
        b = device::exp2_approx(fmaf(b, scale_log2, -new_max));
        total += a + b;
      }
      block_sum[row] = total;
      sum[row] = fmaf(sum[row], rescale[row], total);
    }
  }
};

}  // namespace prefilld::kernels::cuda::sm90

#endif  // PREFILLD_KERNELS_CUDA_ATTENTION_SM90_SOFTMAX_CUH_
