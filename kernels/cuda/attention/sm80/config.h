// The portable attention kernel: tile sizes, shared memory and launch parameters.
//
// One CTA of four warps computes one query tile, which is one query block of the patterns, so that
// a tile has one list of key blocks. Per key tile of 64 it does 4 * rows * 64 * head_dim FLOPs for
// 2 * 64 * head_dim * 2 bytes from L2: 128 FLOPs a byte at 128 rows. So the tensor cores bound it,
// as long as K and V of the tiles under way stay in L2. Each warp holds 32 rows where it can: K and
// V fragments are then read from shared memory once for two row tiles, and shared memory (128 bytes
// a clock) keeps up with mma.sync. The price is registers: at head_dim 128 a thread needs 128 for
// the output and 64 for the logits, so an SM has room for two CTAs of 128 threads.
#ifndef PREFILLD_KERNELS_CUDA_ATTENTION_SM80_CONFIG_H_
#define PREFILLD_KERNELS_CUDA_ATTENTION_SM80_CONFIG_H_

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/attention/plan.h"

namespace prefilld::kernels::cuda::sm80 {

template <int kHeadDim_, int kBlockTokens_, bool kBlockMass_>
struct Config {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockTokens = kBlockTokens_;  // rows of a query tile
  static constexpr bool kBlockMass = kBlockMass_;
  static constexpr int kKeyTile = 64;
  static constexpr int kKeyTilesPerBlock = kBlockTokens / kKeyTile;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kRowTiles = kBlockTokens / (16 * kWarps);  // row tiles of 16 rows per warp
  static_assert(kBlockTokens % (16 * kWarps) == 0, "a warp holds whole row tiles");
  static_assert(kBlockTokens % kKeyTile == 0, "a key block is whole key tiles");
  static_assert(kHeadDim == 64 || kHeadDim == 128, "the swizzle needs 128-byte multiples");
};

// The place of a query tile in the call.
struct QueryTile {
  int row = 0;          // the query block, counted within the call
  int block = 0;        // the same by absolute position, which is its diagonal key block
  int work = 0;         // the index of its head in the group
  int first_valid = 0;  // rows [first_valid, end_valid) of the tile hold queries
  int end_valid = 0;
  int64_t kv_offset = 0;  // elements from the start of k and v to its KV head
  // The index in q of the tile's row 0; negative where the call begins within the block.
  int64_t first_query = 0;
};

// The CTA's shared memory. The words of the tile's pattern row follow it.
template <typename Config>
struct alignas(128) SharedMemory {
  __nv_bfloat16 q[Config::kBlockTokens * Config::kHeadDim];  // later the output, on its way out
  __nv_bfloat16 k[Config::kKeyTile * Config::kHeadDim];
  __nv_bfloat16 v[Config::kKeyTile * Config::kHeadDim];
  float row_lse[Config::kBlockTokens];  // log2 of the row's sum; +infinity for rows with no query
  QueryTile tile;
};

struct KernelParams {
  const __nv_bfloat16* q = nullptr;  // [num_queries, num_heads, head_dim]
  const __nv_bfloat16* k = nullptr;  // [num_kv_heads, num_keys, head_dim], kv_head_stride apart
  const __nv_bfloat16* v = nullptr;  // as k
  __nv_bfloat16* out = nullptr;      // [num_queries, num_heads, head_dim]; may be q
  float* block_log_sums = nullptr;   // [CTAs, row_key_blocks, block_tokens], with block mass only
  int64_t num_queries = 0;
  int64_t num_keys = 0;
  int64_t kv_head_stride = 0;
  int64_t num_tiles = 0;  // num_query_blocks * group.num_heads
  int num_query_blocks = 0;
  int row_key_blocks = 0;  // as kernels/attention.h
  int num_heads = 0;
  int heads_per_kv_head = 0;
  float scale_log2 = 0.0f;  // scale * log2(e)
  HeadGroup group;
};
static_assert(sizeof(KernelParams) <= 4096, "the limit of kernel parameters on older drivers");

// Launches `grid` CTAs of the kernel built for this configuration.
template <typename Config>
cudaError_t LaunchForward(const KernelParams& params, int64_t grid, cudaStream_t stream);

}  // namespace prefilld::kernels::cuda::sm80

#endif  // PREFILLD_KERNELS_CUDA_ATTENTION_SM80_CONFIG_H_
