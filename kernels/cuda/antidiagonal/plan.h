// Divides antidiagonal scores among CTAs, for either path. Pure host functions, some of which the
// kernels call too.
#ifndef PREFILLD_KERNELS_CUDA_ANTIDIAGONAL_PLAN_H_
#define PREFILLD_KERNELS_CUDA_ANTIDIAGONAL_PLAN_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <limits>

#include "kernels/antidiagonal_scores.h"

namespace prefilld::kernels::cuda {

// The heads of a launch travel in its parameters. A call with more of them becomes several
// launches.
inline constexpr int kMaxScoredHeads = 64;
// Four warps compute 64 query folds. They keep a weight for each (key block, fold) in scratch
// memory, [WeightBlocks(), kGroupFolds].
inline constexpr int kGroupFolds = 64;
// The most of such groups that one SM works on at a time, on either path.
inline constexpr int kGroupsPerSm = 2;
// The longest run of key folds that a group takes at a time.
inline constexpr int64_t kMaxFoldRun = 256;

// A part of a call, as both kernels take it.
struct FoldLaunch {
  int heads[kMaxScoredHeads];
  float* block_mass;  // [num_scored, num_query_blocks, num_key_blocks]
  float* weights;     // [groups, weight_blocks, kGroupFolds]
  float scale_log2;   // scale / stride * log2(e)
  int num_scored;
  int heads_per_kv_head;
  int stride;
  int num_folds;
  int first_query_fold;
  int num_key_blocks;
  int first_query_block;
  int num_query_blocks;
  int weight_blocks;
  int last_visible;  // the number of key folds that the last query fold sees
  int first_tile;    // the first tile of query folds that has queries
  int num_items;     // tiles times heads
};

// The number of key folds that query fold `fold` sees; `fold` may be past the last one.
constexpr __host__ __device__ int VisibleFolds(const FoldLaunch& launch, int fold) {
  return fold == launch.num_folds - 1 ? launch.last_visible : fold + 1;
}

// The number of key blocks that scratch memory has room for: whole runs of folds.
constexpr int64_t WeightBlocks(const AntidiagonalScoresParams& p) {
  const AntidiagonalFolds folds(p);
  return CeilDiv(folds.num_folds, kMaxFoldRun) * kMaxFoldRun / folds.per_block;
}

// The item that a worker takes in its `turn`. Items are sorted, the longest first. Every second
// turn the workers take theirs in reverse order, so that nobody always gets the longest of a turn.
// The last turn's items may be num_items or more: there is none for that worker then.
constexpr __host__ __device__ int ItemOfTurn(int turn, int worker, int num_workers) {
  return turn * num_workers + (turn % 2 == 0 ? worker : num_workers - 1 - worker);
}

// Whether kernels exist for the call's shape.
constexpr bool IsSupported(const AntidiagonalScoresParams& p) {
  if (p.head_dim != 64 && p.head_dim != 128) return false;
  if (p.block_tokens != 64 && p.block_tokens != 128) return false;
  if (p.stride != 8 && p.stride != 16) return false;
  if (p.num_kv_heads <= 0 || p.num_heads % p.num_kv_heads != 0) return false;
  if (p.num_queries <= 0 || p.num_queries > p.num_keys || p.num_scored <= 0) return false;
  // Folds are counted in 32 bits, and so are items.
  if (p.num_keys > std::numeric_limits<int32_t>::max()) return false;
  for (int i = 0; i < p.num_scored; ++i) {
    if (p.heads[i] < 0 || p.heads[i] >= p.num_heads) return false;
  }
  return true;
}

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_ANTIDIAGONAL_PLAN_H_
