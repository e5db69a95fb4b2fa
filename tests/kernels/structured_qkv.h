// Queries, keys, values and patterns that resemble real attention: neither zeros nor pure noise.
#ifndef PREFILLD_TESTS_KERNELS_STRUCTURED_QKV_H_
#define PREFILLD_TESTS_KERNELS_STRUCTURED_QKV_H_

#include <cstdint>
#include <random>
#include <vector>

#include "kernels/attention.h"
#include "tests/kernels/cases.h"

namespace prefilld::kernels::testing {

struct Qkv {
  std::vector<float> q;  // [num_queries, num_heads, head_dim]
  std::vector<float> k;  // [num_kv_heads, num_keys, head_dim]
  std::vector<float> v;  // as k
};

// Makes queries, keys and values whose query head h attends, by h % 4, to the first key (sink), to
// its neighbours (local band), to a fixed distance before it (slash), or to keys of its own topic.
// All values are exact in bf16.
Qkv MakeQkv(int64_t num_queries, int64_t num_keys, int num_heads, int num_kv_heads, int head_dim,
            uint32_t seed);

// Makes a causal pattern, [num_query_blocks, PatternWords(num_key_blocks)]: block 0, the diagonal,
// and each other block with probability `density`. The query blocks are the last of num_key_blocks.
std::vector<uint32_t> MakePattern(int64_t num_query_blocks, int64_t num_key_blocks, double density,
                                  uint32_t seed);

// Makes the pattern of packed prompts of 1, 3, 1, 6, 2, 1, ... blocks. Some are followed by a block
// of padding, whose row is zero. The queries cover all blocks.
std::vector<uint32_t> MakePackedPattern(int64_t num_blocks);

// All data of an attention case, in host memory. `work` points into the other members.
struct AttentionData {
  explicit AttentionData(const AttentionCase& c);
  AttentionData(const AttentionData&) = delete;
  AttentionData& operator=(const AttentionData&) = delete;

  int64_t num_query_blocks;
  int64_t num_key_blocks;
  Qkv qkv;
  std::vector<std::vector<uint32_t>> patterns;   // per head, empty: dense
  std::vector<std::vector<uint32_t>> last_rows;  // per head, empty: none
  std::vector<std::vector<float>> block_mass;    // per head, empty: not asked for
  std::vector<HeadWork> work;
  std::vector<float> out;
  AttentionParams params;
};

}  // namespace prefilld::kernels::testing

#endif  // PREFILLD_TESTS_KERNELS_STRUCTURED_QKV_H_
