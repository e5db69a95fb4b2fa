// Decides which launches an attention call becomes. Pure host functions.
#ifndef PREFILLD_KERNELS_CUDA_ATTENTION_PLAN_H_
#define PREFILLD_KERNELS_CUDA_ATTENTION_PLAN_H_

#include <cstdint>

#include "kernels/attention.h"

namespace prefilld::kernels::cuda {

// The most heads of one launch: a kernel's list of heads travels in its parameters, whose size is
// limited. A call with more heads becomes several launches.
inline constexpr int kMaxHeadsPerLaunch = 64;

// The heads of one launch of the portable kernel. Either all of them have block mass or none. Dense
// heads come before heads with a pattern, so that tiles taken in order start with the longest.
struct HeadGroup {
  bool block_mass = false;
  int num_heads = 0;
  int num_dense = 0;  // the first num_dense heads are dense
  HeadWork heads[kMaxHeadsPerLaunch];
};

// Deals the heads of a call into groups, those with block mass first.
class HeadGroups {
 public:
  // `params` is borrowed.
  explicit HeadGroups(const AttentionParams& params) : params_(params) {}
  // Fills `group` with the next heads. Returns false when all heads have been dealt.
  bool Next(HeadGroup* group);

 private:
  const AttentionParams& params_;
  int kind_ = 0;  // the kind of heads being dealt: block mass, dense, pattern
  int next_ = 0;  // index in params_.work
};

// Whether kernels exist for the call's shape and its heads' work is consistent.
bool IsSupported(const AttentionParams& params);

// The number of CTAs of the portable kernel that one SM is asked to hold at a time.
inline constexpr int kCtasPerSm = 2;

// The number of CTAs that the portable kernel runs for heads with block mass. Each of them keeps
// one float in scratch memory for each (row of its tile, key block); so their number is limited to
// what the GPU holds at a time, and each takes several tiles.
int64_t BlockMassCtas(const AttentionParams& params, int num_heads, int num_sms);
constexpr int64_t BlockMassFloatsPerCta(const AttentionParams& params) {
  return RowKeyBlocks(params) * params.block_tokens;
}

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_ATTENTION_PLAN_H_
