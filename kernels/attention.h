// Causal attention of one sequence: dense, block-sparse, and dense with block mass in one op.
//
// For the conventions of params structs see kernels/layer_ops.h.
#ifndef PREFILLD_KERNELS_ATTENTION_H_
#define PREFILLD_KERNELS_ATTENTION_H_

#include <cstdint>

#include "kernels/dtype.h"

namespace prefilld::kernels {

// The number of blocks of size `block` that hold `n` elements.
constexpr int64_t CeilDiv(int64_t n, int64_t block) { return (n + block - 1) / block; }

// The number of 32-bit words of a pattern's row.
//
// A pattern is a bitmap over (query block, key block). In row r, bit c % 32 of word c / 32 says
// whether key block c is computed. Bits above the diagonal are zero. The diagonal block is computed
// whether its bit is set or not, so that every query sees a key; a row of zeros means the diagonal
// alone.
constexpr int64_t PatternWords(int64_t num_key_blocks) { return CeilDiv(num_key_blocks, 32); }

// The work to do for one query head.
struct HeadWork {
  int head = 0;
  // [NumQueryBlocks, PatternWords(RowKeyBlocks)], device memory. Null: dense. Several heads may
  // point at one pattern.
  const uint32_t* pattern = nullptr;
  // [PatternWords(RowKeyBlocks)], device memory, OR-ed into the last row. May be null.
  const uint32_t* last_row = nullptr;
  // [NumQueryBlocks, RowKeyBlocks] fp32, device memory. May be null, and must be for heads with
  // a pattern. Receives the mass of every block: the softmax probability that falls on the key
  // block's columns, averaged over the query block's rows. Each row sums to 1; entries above the
  // diagonal are 0. The absolute error is at most 1e-3.
  float* block_mass = nullptr;
};

// Computes exact softmax attention over the chosen blocks, causal within the diagonal block.
//
// The queries are the last num_queries of num_keys positions: query i is at absolute position
// num_keys - num_queries + i and sees the keys up to that position. Query blocks are aligned to
// absolute positions: query block r of the call holds the queries of absolute block
// FirstQueryBlock() + r. Query head h reads KV head h / (num_heads / num_kv_heads).
struct AttentionParams {
  const void* q = nullptr;  // [num_queries, num_heads, head_dim]
  const void* k = nullptr;  // [num_kv_heads, num_keys, head_dim] with a stride between heads
  const void* v = nullptr;  // as k
  void* out = nullptr;      // [num_queries, num_heads, head_dim]; may be q
  int64_t num_queries = 0;
  int64_t num_keys = 0;
  int64_t kv_head_stride = 0;  // elements between KV heads, >= num_keys * head_dim
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;        // 64 or 128
  int block_tokens = 128;  // tokens of a block of patterns and block mass: 64 or 128
  // The key blocks that a row of patterns and of block mass has room for, if they are more than
  // those of num_keys: so a call can compute some query blocks of a longer prompt, with pointers
  // into what belongs to all of it.
  int64_t row_key_blocks = 0;
  float scale = 0.0f;              // factor of the logits, usually 1 / sqrt(head_dim)
  const HeadWork* work = nullptr;  // [num_work], host memory; other heads are not touched
  int num_work = 0;
};

// The absolute position of the first query block, and how many there are.
constexpr int64_t FirstQueryBlock(const AttentionParams& params) {
  return (params.num_keys - params.num_queries) / params.block_tokens;
}
constexpr int64_t NumQueryBlocks(const AttentionParams& params) {
  return CeilDiv(params.num_keys, params.block_tokens) - FirstQueryBlock(params);
}
// The key blocks that a row of patterns and of block mass has room for.
constexpr int64_t RowKeyBlocks(const AttentionParams& params) {
  const int64_t key_blocks = CeilDiv(params.num_keys, params.block_tokens);
  return params.row_key_blocks > key_blocks ? params.row_key_blocks : key_blocks;
}

// Computes attention of one decode step: a single query over a paged KV cache.
//
// The cache is an array of blocks; block b of the sequence is pool block block_table[b]. Within a
// block, token t of KV head h is at h * head_stride + t * token_stride (elements). That covers both
// block orders of the wire:
// - NHD: token_stride = num_kv_heads * head_dim, head_stride = head_dim;
// - HND: token_stride = head_dim, head_stride = block_tokens * head_dim.
struct PagedAttentionParams {
  const void* q = nullptr;               // [num_heads, head_dim]
  const void* k_pool = nullptr;          // [pool_blocks, block_stride elements]
  const void* v_pool = nullptr;          // as k_pool
  const int32_t* block_table = nullptr;  // [CeilDiv(num_keys, block_tokens)], device memory
  void* out = nullptr;                   // [num_heads, head_dim]; may be q
  int64_t num_keys = 0;                  // includes the new token's own key
  int64_t block_stride = 0;
  int64_t head_stride = 0;
  int64_t token_stride = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int block_tokens = 0;  // 16, 32, 64 or 128
  float scale = 0.0f;
  // fp32 scratch in device memory, for a split over the keys; PagedAttentionScratchFloats() long.
  float* scratch = nullptr;
};

// The most splits over the keys. The CUDA kernel uses them so that one query fills the GPU.
inline constexpr int kPagedAttentionMaxSplits = 64;
constexpr int64_t PagedAttentionScratchFloats(int num_heads, int head_dim) {
  return static_cast<int64_t>(num_heads) * kPagedAttentionMaxSplits * (head_dim + 2);
}

}  // namespace prefilld::kernels

#endif  // PREFILLD_KERNELS_ATTENTION_H_
