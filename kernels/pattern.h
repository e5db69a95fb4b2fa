// The heavy parts of pattern sharing: everything that touches tensors of prompt length.
//
// Which head does what is decided above, once for all backends, from the small results of these
// ops. The algorithm is that of SharePrefill (arXiv 2505.19578). Outputs live in device memory;
// masses are fp32. B is block_tokens, n = CeilDiv(num_keys, B), W = PatternWords(n).
#ifndef PREFILLD_KERNELS_PATTERN_H_
#define PREFILLD_KERNELS_PATTERN_H_

#include <cstdint>

#include "kernels/attention.h"

namespace prefilld::kernels {

// The estimate of all heads from the last query block: S = softmax(Q K^T * scale), causal, fp32,
// over the last num_queries positions, averaged over those rows.
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
  void* scratch = nullptr;      // EstimateScratchBytes() bytes
};

// The inputs of an estimate from queries [first, end) of `attention`, whose queries and keys are
// those of the whole prompt, against the keys before `end`; at most a block of queries. The outputs
// and scratch are left to set.
inline EstimateParams EstimateInputs(const AttentionParams& attention, int64_t first, int64_t end,
                                     DType dtype) {
  const int64_t query_offset =
      first * attention.num_heads * attention.head_dim * static_cast<int64_t>(SizeOf(dtype));
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

// Large enough for every path of either backend: the maximum and sum of every row over each run of
// 256 keys, and one float per key.
constexpr int64_t EstimateScratchBytes(int num_heads, int64_t num_keys, int block_tokens) {
  const int64_t row_runs = static_cast<int64_t>(block_tokens) * (CeilDiv(num_keys, 256) + 3);
  return static_cast<int64_t>(sizeof(float)) * num_heads * (2 * row_runs + num_keys);
}

// The vertical-slash sets of all heads: the smallest set of columns whose vertical mass reaches
// gamma and the smallest set of diagonals whose slash mass does, at least min_budget_tokens of
// each (or all there are), lowest index first among equals; column 0 and diagonal 0 always.
// Rounded to blocks: a diagonal at offset o crosses block diagonal o / B and, unless B divides o,
// the one after it as well.
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

// pattern[r] = columns | diagonals shifted to row r, cut at the diagonal, head by head.
struct ExpandVerticalSlashParams {
  const uint32_t* columns = nullptr;    // [num_heads, W]
  const uint32_t* diagonals = nullptr;  // [num_heads, W]
  int64_t num_query_blocks = 0;         // the last ones of num_key_blocks
  int64_t num_key_blocks = 0;
  uint32_t* pattern = nullptr;  // [num_heads, num_query_blocks, W]
  int num_heads = 1;
  int64_t* blocks = nullptr;  // [num_heads]: bits set; may be null
};

// Patterns from block mass: per row the smallest set of key blocks whose mass reaches gamma of the
// row's (lowest index first among equals), plus block 0 and the diagonal.
struct SelectRowsParams {
  // [num_heads, num_query_blocks, num_key_blocks], as attention or, for one row, the estimate
  // writes it.
  const float* block_mass = nullptr;
  int64_t num_query_blocks = 0;  // the last ones of num_key_blocks
  int64_t num_key_blocks = 0;
  float gamma = 0.9f;
  uint32_t* pattern = nullptr;  // [num_heads, num_query_blocks, W]
  int num_heads = 1;
};

// How much of a head's block mass a pattern holds, and how many blocks it has.
struct MeasurePatternParams {
  const float* block_mass = nullptr;   // [num_query_blocks, num_key_blocks]; null: count only
  const uint32_t* pattern = nullptr;   // [num_query_blocks, W]
  const uint32_t* last_row = nullptr;  // [W], OR-ed into the last row; may be null
  int64_t num_query_blocks = 0;
  int64_t num_key_blocks = 0;
  // Mean over the rows of the mass inside the pattern; null if no block_mass.
  double* mass = nullptr;
  int64_t* blocks = nullptr;  // number of blocks
};

}  // namespace prefilld::kernels

#endif  // PREFILLD_KERNELS_PATTERN_H_
