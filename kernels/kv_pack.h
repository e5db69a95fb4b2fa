// Packs the KV of one layer from the layout of attention into the blocks of the wire.
#ifndef PREFILLD_KERNELS_KV_PACK_H_
#define PREFILLD_KERNELS_KV_PACK_H_

#include <cstdint>

#include "kernels/dtype.h"

namespace prefilld::kernels {

enum class KvOrder : uint8_t { kNhd, kHnd, kNh2d, kHn2d };

// In these orders a block holds K and V, which alternate head by head.
constexpr bool IsInterleaved(KvOrder order) {
  return order == KvOrder::kNh2d || order == KvOrder::kHn2d;
}

// Writes the blocks of the wire to dst, as `order` says:
// - kNhd:  [2 (K, V), num_blocks, block_tokens, num_heads, head_dim]
// - kHnd:  [2 (K, V), num_blocks, num_heads, block_tokens, head_dim]
// - kNh2d: [num_blocks, block_tokens, num_heads, 2 (K, V), head_dim]
// - kHn2d: [num_blocks, num_heads, block_tokens, 2 (K, V), head_dim]
//
// Elements are converted to dst_dtype, rounded to the nearest, ties to even; too large values
// become infinity in fp16. Tokens from num_tokens on are zero.
struct PackKvParams {
  const void* k = nullptr;  // [num_kv_heads, num_tokens, head_dim], compute dtype
  const void* v = nullptr;  // as k
  int64_t kv_head_stride = 0;
  int64_t num_tokens = 0;   // tokens of the sequence
  int64_t first_block = 0;  // block b holds tokens [b * block_tokens, (b + 1) * block_tokens)
  int64_t num_blocks = 0;
  int block_tokens = 16;
  int first_head = 0;  // KV heads [first_head, first_head + num_heads)
  int num_heads = 0;
  int head_dim = 0;
  KvOrder order = KvOrder::kNhd;
  DType dst_dtype = DType::kBf16;
  void* dst = nullptr;  // PackedBytes() long
};

constexpr int64_t PackedBytes(const PackKvParams& p) {
  return 2 * p.num_blocks * p.block_tokens * p.num_heads * p.head_dim *
         static_cast<int64_t>(SizeOf(p.dst_dtype));
}

// The distances between neighbours along each axis of dst, in elements. Those along head_dim are
// next to each other in every order.
struct PackedStrides {
  int64_t tensor;  // from K to V
  int64_t block;
  int64_t token;  // within a block
  int64_t head;
};

constexpr PackedStrides StridesOf(const PackKvParams& p) {
  const int64_t dim = p.head_dim, heads = p.num_heads, tokens = p.block_tokens;
  const int64_t block = tokens * heads * dim;  // of one tensor
  switch (p.order) {
    case KvOrder::kNhd:
      return {.tensor = p.num_blocks * block, .block = block, .token = heads * dim, .head = dim};
    case KvOrder::kHnd:
      return {.tensor = p.num_blocks * block, .block = block, .token = dim, .head = tokens * dim};
    case KvOrder::kNh2d:
      return {.tensor = dim, .block = 2 * block, .token = heads * 2 * dim, .head = 2 * dim};
    case KvOrder::kHn2d:
      break;
  }
  return {.tensor = dim, .block = 2 * block, .token = 2 * dim, .head = tokens * 2 * dim};
}

}  // namespace prefilld::kernels

#endif  // PREFILLD_KERNELS_KV_PACK_H_
