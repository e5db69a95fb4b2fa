// Which launches an attention call becomes. Pure host functions.
#ifndef PREFILLD_KERNELS_CUDA_ATTENTION_PLAN_H_
#define PREFILLD_KERNELS_CUDA_ATTENTION_PLAN_H_

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/attention.h"

namespace prefilld::kernels::cuda {

// A kernel's list of heads travels in its parameters.
inline constexpr int kMaxHeadsPerLaunch = 64;

// Heads of one launch: all with block mass or none; dense heads before heads with a pattern, so
// that tiles taken in order start with the longest.
struct HeadGroup {
  bool block_mass = false;
  int num_heads = 0;
  int num_dense = 0;
  HeadWork heads[kMaxHeadsPerLaunch];
};

// Deals the heads of a call into groups, those with block mass first.
class HeadGroups {
 public:
  // `params` is borrowed.
  explicit HeadGroups(const AttentionParams& params) : params_(params) {}
  // False when all heads have been dealt.
  bool Next(HeadGroup* group);

 private:
  const AttentionParams& params_;
  int kind_ = 0;  // of the heads being dealt: block mass, dense, pattern
  int next_ = 0;  // in params_.work
};

// What the choice of kernels depends on.
struct GpuTraits {
  int num_multiprocessors = 0;
  int compute_major = 0;
};

// Whether the call runs on the kernels of attention/sm90; wgmma exists on compute capability 9
// alone.
bool UseHopper(const AttentionParams& params, const GpuTraits& gpu, AttentionPath path);

// Whether kernels exist for the call's shape and its heads' work is consistent.
bool IsSupported(const AttentionParams& params);

constexpr int64_t NumQueryBlocks(const AttentionParams& params) {
  const int64_t first_query = params.num_keys - params.num_queries;
  return CeilDiv(params.num_keys, params.block_tokens) - first_query / params.block_tokens;
}

// CTAs that one multiprocessor is asked to hold at a time.
inline constexpr int kCtasPerMultiprocessor = 2;

// The kernel with block mass keeps, per resident CTA, one float for each (row of its tile, key
// block); so it runs a fixed number of CTAs that each take several tiles.
int64_t BlockMassCtas(const AttentionParams& params, int num_heads, int num_multiprocessors);
constexpr int64_t BlockMassFloatsPerCta(const AttentionParams& params) {
  return CeilDiv(params.num_keys, params.block_tokens) * params.block_tokens;
}

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_ATTENTION_PLAN_H_
