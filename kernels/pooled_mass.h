// A prediction of a head's block mass from block means of queries and keys.
//
// FlexPrefill (Lai et al., arXiv 2502.20766) chooses blocks by it where a head's attention follows
// the query. Here it serves a baseline of the evaluation; see model/sparse/baseline_attention.h.
// For the conventions of params structs see kernels/layer_ops.h.
#ifndef PREFILLD_KERNELS_POOLED_MASS_H_
#define PREFILLD_KERNELS_POOLED_MASS_H_

#include <cstdint>

namespace prefilld::kernels {

// Computes block_mass for one head of a whole prompt, with as many queries as keys. Row r is the
// softmax over the blocks c <= r of scale * (mean of q over block r) . (mean of k over block c),
// and 0 above the diagonal. The last block's mean is over the tokens it has. n is the number of
// blocks.
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

#endif  // PREFILLD_KERNELS_POOLED_MASS_H_
