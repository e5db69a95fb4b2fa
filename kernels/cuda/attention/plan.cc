#include "kernels/cuda/attention/plan.h"

#include <algorithm>
#include <limits>

namespace prefilld::kernels::cuda {
namespace {

enum Kind { kBlockMass, kDense, kPattern, kNumKinds };

int KindOf(const HeadWork& work) {
  if (work.block_mass != nullptr) return kBlockMass;
  return work.pattern == nullptr ? kDense : kPattern;
}

}  // namespace

bool HeadGroups::Next(HeadGroup* group) {
  group->num_heads = 0;
  group->num_dense = 0;
  while (kind_ < kNumKinds && group->num_heads < kMaxHeadsPerLaunch) {
    if (next_ == params_.num_work) {
      next_ = 0;
      ++kind_;
      // Heads with block mass share a launch with no others.
      if (kind_ == kDense && group->num_heads > 0) break;
      continue;
    }
    const HeadWork& work = params_.work[next_++];
    if (KindOf(work) != kind_) continue;
    group->block_mass = kind_ == kBlockMass;
    if (kind_ != kPattern) ++group->num_dense;
    group->heads[group->num_heads++] = work;
  }
  return group->num_heads > 0;
}

bool IsSupported(const AttentionParams& params) {
  if (params.head_dim != 64 && params.head_dim != 128) return false;
  if (params.block_tokens != 64 && params.block_tokens != 128) return false;
  if (params.num_kv_heads <= 0 || params.num_heads % params.num_kv_heads != 0) return false;
  if (params.num_queries <= 0 || params.num_queries > params.num_keys) return false;
  if (params.num_keys > std::numeric_limits<int32_t>::max()) return false;  // positions are int
  for (int i = 0; i < params.num_work; ++i) {
    const HeadWork& work = params.work[i];
    if (work.head < 0 || work.head >= params.num_heads) return false;
    if (work.block_mass != nullptr && work.pattern != nullptr) return false;
  }
  return true;
}

int64_t BlockMassCtas(const AttentionParams& params, int num_heads, int num_sms) {
  return std::min<int64_t>(static_cast<int64_t>(num_sms) * kCtasPerSm,
                           NumQueryBlocks(params) * num_heads);
}

}  // namespace prefilld::kernels::cuda
