// Divides the work of estimates and of vertical-slash sets among CTAs, and lays out the scratch
// memory of an estimate. Pure host functions.
#ifndef PREFILLD_KERNELS_CUDA_PATTERN_PLAN_H_
#define PREFILLD_KERNELS_CUDA_PATTERN_PLAN_H_

#include <algorithm>
#include <cstdint>

#include "kernels/attention.h"

namespace prefilld::kernels::cuda {

inline constexpr int kMaxEstimateRows = 128;  // query rows of one estimate

struct EstimatePlan {
  int64_t chunk_keys = 0;  // keys of one CTA; a multiple of 256
  int num_chunks = 0;
};

// Plans the portable path. There are enough chunks to fill a GPU with a few heads, but so few that
// a CTA's start is small beside its work. A chunk is short enough that the sums of its diagonals
// fit into shared memory.
constexpr EstimatePlan PlanEstimate(int64_t num_keys) {
  constexpr int64_t kGranule = 256;
  constexpr int64_t kMaxChunkKeys = 4096;
  EstimatePlan plan;
  plan.chunk_keys =
      std::clamp(CeilDiv(CeilDiv(num_keys, 64), kGranule) * kGranule, kGranule, kMaxChunkKeys);
  plan.num_chunks = static_cast<int>(CeilDiv(num_keys, plan.chunk_keys));
  return plan;
}

// The scratch memory's parts: their offsets, and the length of the whole, in floats.
struct EstimateScratch {
  int64_t row_sums = 0;
  int64_t row_lse = 0;
  int64_t overhangs = 0;
  int64_t floats = 0;
};

// Lays out the scratch memory of the portable path. `rows` is block_tokens.
constexpr EstimateScratch LayOutEstimateScratch(const EstimatePlan& plan, int num_heads, int rows) {
  const int64_t heads = num_heads;
  EstimateScratch scratch;
  scratch.row_lse = scratch.row_sums + 2 * heads * plan.num_chunks * rows;
  scratch.overhangs = scratch.row_lse + heads * rows;
  scratch.floats =
      scratch.overhangs + (plan.num_chunks > 1 ? heads * plan.num_chunks * kMaxEstimateRows : 0);
  return scratch;
}

namespace sm90 {

inline constexpr int kEstimateBlock = 128;       // queries of an estimate, and keys of a block
inline constexpr int kEstimateGroupBlocks = 16;  // blocks a CTA takes at a time, one per warp

// The number of groups of blocks that cover all keys and all offsets. To cover all offsets, there
// must be a block whose upper diagonals begin at or below offset 0; a block's begin at the offset
// first query - first key of the block.
constexpr int NumEstimateGroups(int64_t num_queries, int64_t num_keys) {
  const int64_t blocks = std::max(CeilDiv(num_keys, kEstimateBlock),
                                  CeilDiv(num_keys - num_queries, kEstimateBlock) + 1);
  return static_cast<int>(CeilDiv(blocks, kEstimateGroupBlocks));
}

// Lays out the scratch memory of the Hopper path. Each half of a group has its own sums of rows.
constexpr EstimateScratch LayOutEstimateScratch(int num_groups, int num_heads) {
  const int64_t head_rows = static_cast<int64_t>(num_heads) * kEstimateBlock;
  EstimateScratch scratch;
  scratch.row_lse = scratch.row_sums + 2 * 2 * head_rows * num_groups;
  scratch.overhangs = scratch.row_lse + head_rows;
  scratch.floats = scratch.overhangs + head_rows * (num_groups - 1);
  return scratch;
}

}  // namespace sm90

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

#endif  // PREFILLD_KERNELS_CUDA_PATTERN_PLAN_H_
