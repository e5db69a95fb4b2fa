// An estimate of every block's attention mass in which every query has a say, at a fraction of the
// cost of attention: antidiagonal scores (XAttention, Xu et al., arXiv 2503.16428).
//
// For the conventions of params structs see kernels/layer_ops.h.
#ifndef PREFILLD_KERNELS_ANTIDIAGONAL_SCORES_H_
#define PREFILLD_KERNELS_ANTIDIAGONAL_SCORES_H_

#include <cstdint>

#include "kernels/attention.h"

namespace prefilld::kernels {

// Cuts positions into folds of `stride`: fold i is positions [stride * i, stride * (i + 1)). The
// score of query fold i on key fold j is the sum over an antidiagonal of their stride x stride tile
// of Q K^T,
//     S[i, j] = sum over t in [0, stride) of q[stride * i + stride - 1 - t] . k[stride * j + t],
// one product with 1 / stride of the work of Q K^T. A position that the call does not have counts
// as zeros: keys from num_keys on, and queries before the first or after the last one.
//
// block_mass[r, c] is the mean over the query folds of block r of the sum over the key folds of
// block c of P = softmax over j <= i of S[i, j] * scale / stride. So each row sums to 1.
// - The mean is over the folds that have a query. Other folds of a first or last block, which have
//   none, do not count.
// - Every key fold up to i has a key. If the last fold is so short that no pair of a query and a
// key
//   of it lies on the antidiagonal, S[i, i] is not a score but padding alone; then it is left out,
//   unless it is the only fold.
//
// The queries are the last num_queries of num_keys positions, at any offset: neither a multiple of
// the block nor of the stride. Query blocks are numbered as in AttentionParams, query head h reads
// KV head h / (num_heads / num_kv_heads).
struct AntidiagonalScoresParams {
  const void* q = nullptr;  // [num_queries, num_heads, head_dim]
  const void* k = nullptr;  // [num_kv_heads, num_keys, head_dim], kv_head_stride between heads
  int64_t num_queries = 0;
  int64_t num_keys = 0;
  int64_t kv_head_stride = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int block_tokens = 128;      // a multiple of the stride
  int stride = 8;              // 8 or 16
  float scale = 0.0f;          // factor of the logits of attention, usually 1 / sqrt(head_dim)
  const int* heads = nullptr;  // [num_scored], host memory: the query heads to score
  int num_scored = 0;
  // [num_scored, num_query_blocks, num_key_blocks] fp32, in the order of `heads`. Entries above the
  // diagonal are not written.
  float* block_mass = nullptr;
};

// The folds and blocks of a call.
struct AntidiagonalFolds {
  constexpr explicit AntidiagonalFolds(const AntidiagonalScoresParams& p)
      : num_folds(CeilDiv(p.num_keys, p.stride)),
        first_query_fold((p.num_keys - p.num_queries) / p.stride),
        num_key_blocks(CeilDiv(p.num_keys, p.block_tokens)),
        first_query_block((p.num_keys - p.num_queries) / p.block_tokens),
        num_query_blocks(num_key_blocks - first_query_block),
        per_block(p.block_tokens / p.stride),
        last_sees_itself(num_folds == 1 ||
                         2 * (p.num_keys - (num_folds - 1) * p.stride) > p.stride) {}

  // The number of key folds that query fold i sees.
  constexpr int64_t Visible(int64_t i) const {
    return i + (i + 1 < num_folds || last_sees_itself ? 1 : 0);
  }

  int64_t num_folds;  // that have a key
  int64_t first_query_fold;
  int64_t num_key_blocks;
  int64_t first_query_block;
  int64_t num_query_blocks;
  int64_t per_block;
  bool last_sees_itself;  // the last fold's score on itself has a pair of query and key
};

}  // namespace prefilld::kernels

#endif  // PREFILLD_KERNELS_ANTIDIAGONAL_SCORES_H_
