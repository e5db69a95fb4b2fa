// Decides how many CTAs search a vertical-slash set. A pure host function.
#ifndef PREFILLD_KERNELS_CUDA_PATTERN_VERTICAL_SLASH_PLAN_H_
#define PREFILLD_KERNELS_CUDA_PATTERN_VERTICAL_SLASH_PLAN_H_

#include <cstdint>

namespace prefilld::kernels::cuda {

// Returns the number of CTAs of the cluster that searches a set; there are two sets a head. It is
// as large as the SMs have room for when all sets are searched at once, but each CTA gets at least
// kMinShare values: it reads so many in the time that the cluster takes to exchange a histogram.
constexpr int VerticalSlashClusterSize(int num_heads, int64_t num_keys, int num_sms) {
  constexpr int kMaxClusterSize = 8;  // more is not portable
  constexpr int64_t kMinShare = 8192;
  int size = 1;
  while (size < kMaxClusterSize && int64_t{2} * num_heads * 2 * size <= num_sms &&
         num_keys >= 2 * size * kMinShare) {
    size *= 2;
  }
  return size;
}

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_PATTERN_VERTICAL_SLASH_PLAN_H_
