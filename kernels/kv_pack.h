// Packs the KV of one layer from the layout of attention into the blocks of the wire.
#ifndef PREFILLD_KERNELS_KV_PACK_H_
#define PREFILLD_KERNELS_KV_PACK_H_

#include <cstdint>

#include "kernels/dtype.h"

namespace prefilld::kernels {

enum class KvOrder : uint8_t { kNhd, kHnd };

// Writes dst = [2 (K, V), num_blocks, one block]. A block is [block_tokens, num_heads, head_dim]
// (NHD) or [num_heads, block_tokens, head_dim] (HND). Elements are converted to dst_dtype, rounded
// to the nearest, ties to even; too large values become infinity in fp16. Tokens from num_tokens on
// are zero.
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

}  // namespace prefilld::kernels

#endif  // PREFILLD_KERNELS_KV_PACK_H_
