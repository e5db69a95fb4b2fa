// The heavy parts of pattern sharing: everything that touches tensors of prompt length.
//
// From the small results of these ops, model/sparse decides once for all devices which head does
// what. The algorithm is that of SharePrefill (arXiv 2505.19578). Outputs are in device memory;
// masses are fp32. B is block_tokens, n = CeilDiv(num_keys, B), W = PatternWords(n).
#ifndef PREFILLD_KERNELS_PATTERN_H_
#define PREFILLD_KERNELS_PATTERN_H_

#include <cstdint>

#include "kernels/attention.h"

namespace prefilld::kernels {

// Estimates all heads' attention from the last query block: the causal S = softmax(Q K^T * scale)
// of the last num_queries positions, in fp32, averaged over those rows. The outputs are its sums
// over key blocks, over columns and over diagonals.
struct EstimateParams {
  const void* q = nullptr;  // [num_queries, num_heads, head_dim]: the last queries of the prompt
  const void* k = nullptr;  // [num_kv_heads, num_keys, head_dim], kv_head_stride between heads
  int64_t num_queries = 0;  // 1 .. min(B, num_keys)
  int64_t num_keys = 0;
  int64_t kv_head_stride = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int block_tokens = 128;
  float scale = 0.0f;
  float* block_mass = nullptr;  // [num_heads, n]: per key block; sums to 1
  float* vertical = nullptr;    // [num_heads, num_keys]: per key position; sums to 1
  float* slash = nullptr;       // [num_heads, num_keys]: per offset (query - key); sums to 1
  void* scratch = nullptr;      // EstimateScratchBytes() long
};

// Returns the inputs of an estimate from queries [first, end) of `attention` against the keys
// before `end`. Queries are numbered by their positions, and `attention` has them; [first, end) is
// at most a block. The caller sets the outputs and scratch.
inline EstimateParams EstimateInputs(const AttentionParams& attention, int64_t first, int64_t end,
                                     DType dtype) {
  const int64_t query = first - (attention.num_keys - attention.num_queries);
  const int64_t query_offset =
      query * attention.num_heads * attention.head_dim * static_cast<int64_t>(SizeOf(dtype));
  return {.q = static_cast<const char*>(attention.q) + query_offset,
          .k = attention.k,
          .num_queries = end - first,
          .num_keys = end,
          .kv_head_stride = attention.kv_head_stride,
          .num_heads = attention.num_heads,
          .num_kv_heads = attention.num_kv_heads,
          .head_dim = attention.head_dim,
          .block_tokens = attention.block_tokens,
          .scale = attention.scale};
}

// The bytes of scratch memory, enough for every path on either device: the maximum and sum of every
// row over each run of 256 keys, and one float per key.
constexpr int64_t EstimateScratchBytes(int num_heads, int64_t num_keys, int block_tokens) {
  const int64_t row_runs = static_cast<int64_t>(block_tokens) * (CeilDiv(num_keys, 256) + 3);
  return static_cast<int64_t>(sizeof(float)) * num_heads * (2 * row_runs + num_keys);
}

// Finds the vertical-slash sets of all heads, rounded to blocks. They are the smallest set of
// columns whose vertical mass reaches gamma and the smallest set of diagonals whose slash mass
// does.
// - Each has at least min_budget_tokens members, or all there are.
// - Among equals, the lowest index comes first.
// - Column 0 and diagonal 0 are always members.
// - A diagonal at offset o crosses block diagonal o / B and, unless B divides o, also the next one.
struct VerticalSlashParams {
  const float* vertical = nullptr;  // [num_heads, num_keys]
  const float* slash = nullptr;     // [num_heads, num_keys]
  int64_t num_keys = 0;
  int num_heads = 0;
  int block_tokens = 128;
  float gamma = 0.9f;
  int64_t min_budget_tokens = 0;
  uint32_t* columns = nullptr;    // [num_heads, W]: bit c, key block c in every row
  uint32_t* diagonals = nullptr;  // [num_heads, W]: bit j, key block r - j in every row r
};

// Makes patterns from vertical-slash sets. For each head, pattern[r] = columns | diagonals shifted
// to row r, cut off after the diagonal.
struct ExpandVerticalSlashParams {
  const uint32_t* columns = nullptr;    // [num_heads, W]
  const uint32_t* diagonals = nullptr;  // [num_heads, W]
  int64_t num_query_blocks = 0;         // they are the last of the num_key_blocks
  int64_t num_key_blocks = 0;
  uint32_t* pattern = nullptr;  // [num_heads, num_query_blocks, W]
  int num_heads = 1;
  int64_t* blocks = nullptr;  // [num_heads]: the number of bits set; may be null
};

// Makes patterns from block mass. A row gets the smallest set of key blocks whose mass reaches
// gamma of the row's (lowest index first among equals), and block 0 and the diagonal. With `join`
// it also keeps the blocks that the pattern has already.
struct SelectRowsParams {
  // [num_heads, num_query_blocks, num_key_blocks], as attention or antidiagonal scores write it or,
  // for one row, the estimate. Entries above the diagonal are not read.
  const float* block_mass = nullptr;
  int64_t num_query_blocks = 0;  // they are the last of the num_key_blocks
  int64_t num_key_blocks = 0;
  float gamma = 0.9f;
  uint32_t* pattern = nullptr;  // [num_heads, num_query_blocks, W]
  int num_heads = 1;
  bool join = false;
  int64_t* blocks = nullptr;  // [num_heads]: the number of bits set; may be null
};

// Measures how much of a head's block mass a pattern holds, and how many blocks it has.
struct MeasurePatternParams {
  const float* block_mass = nullptr;   // [num_query_blocks, num_key_blocks]; null: count only
  const uint32_t* pattern = nullptr;   // [num_query_blocks, W]
  const uint32_t* last_row = nullptr;  // [W], OR-ed into the last row; may be null
  int64_t num_query_blocks = 0;
  int64_t num_key_blocks = 0;
  // [1]: the mean over the rows of the mass inside the pattern; null if there is no block_mass.
  double* mass = nullptr;
  int64_t* blocks = nullptr;  // [1]: the number of blocks
};

// Predicts the block mass of one head of a whole prompt, with as many queries as keys, from the
// means of blocks of queries and keys. Row r is the
// softmax over the blocks c <= r of scale * (mean of q over block r) . (mean of k over block c),
// and 0 above the diagonal. The last block's mean is over the tokens it has. n is the number of
// blocks.
//
// FlexPrefill (Lai et al., arXiv 2502.20766) chooses blocks by it where a head's attention follows
// the query. Here it serves a baseline of the evaluation; see model/sparse/baseline_attention.h.
struct PooledMassParams {
  const void* q = nullptr;  // [num_tokens, num_heads, head_dim]
  const void* k = nullptr;  // [num_kv_heads, num_tokens, head_dim], kv_head_stride between heads
  int64_t num_tokens = 0;
  int64_t kv_head_stride = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int block_tokens = 128;
  float scale = 0.0f;
  int head = 0;
  float* block_mass = nullptr;  // [n, n]
  float* scratch = nullptr;     // [2, n, head_dim]: the means of queries, then of keys
};

}  // namespace prefilld::kernels

#endif  // PREFILLD_KERNELS_PATTERN_H_
