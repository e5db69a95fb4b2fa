// The attention of some query blocks of a call, as a call of its own.
#ifndef PREFILLD_KERNELS_ATTENTION_PART_H_
#define PREFILLD_KERNELS_ATTENTION_PART_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/attention.h"

namespace prefilld::kernels {

// Describes the query blocks [first, end) of `whole` as a call, which gives them, bit for bit, what
// the whole call gives them. An element of q and out takes `element_bytes`. `work`
// [whole.num_work] gets the heads, and must live as long as the result.
inline AttentionParams PartOf(const AttentionParams& whole, int64_t first, int64_t end,
                              size_t element_bytes, HeadWork* work) {
  const int64_t first_block = FirstQueryBlock(whole);
  const int64_t first_position = whole.num_keys - whole.num_queries;
  const int64_t position = std::max(first_position, (first_block + first) * whole.block_tokens);
  const int64_t skipped_bytes = (position - first_position) * whole.num_heads * whole.head_dim *
                                static_cast<int64_t>(element_bytes);
  AttentionParams part = whole;
  part.row_key_blocks = RowKeyBlocks(whole);
  part.num_keys = std::min(whole.num_keys, (first_block + end) * whole.block_tokens);
  part.num_queries = part.num_keys - position;
  part.q = static_cast<const char*>(whole.q) + skipped_bytes;
  part.out = static_cast<char*>(whole.out) + skipped_bytes;
  part.work = work;
  for (int i = 0; i < whole.num_work; ++i) {
    work[i] = whole.work[i];
    if (work[i].pattern != nullptr) work[i].pattern += first * PatternWords(part.row_key_blocks);
    if (work[i].block_mass != nullptr) work[i].block_mass += first * part.row_key_blocks;
    if (part.num_keys < whole.num_keys) work[i].last_row = nullptr;
  }
  return part;
}

}  // namespace prefilld::kernels

#endif  // PREFILLD_KERNELS_ATTENTION_PART_H_
