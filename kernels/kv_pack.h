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

// A scale is for a token and head of K or V, or for a whole block and head.
enum class KvScales : uint8_t { kNone, kPerToken, kPerBlock };

// Writes the blocks of the wire to dst, as `order` says:
// - kNhd:  [2 (K, V), num_blocks, block_tokens, num_heads, head_dim]
// - kHnd:  [2 (K, V), num_blocks, num_heads, block_tokens, head_dim]
// - kNh2d: [num_blocks, block_tokens, num_heads, 2 (K, V), head_dim]
// - kHn2d: [num_blocks, num_heads, block_tokens, 2 (K, V), head_dim]
//
// Elements are converted to dst_dtype, rounded to the nearest, ties to even; too large values
// become infinity in fp16. Tokens from num_tokens on are zero.
//
// With scales the elements are fp8 e4m3, and the scales follow them as fp32: an array with the same
// order of axes in which head_dim is 1, and block_tokens too where a scale is for a block. A vector
// is what has one scale. Its scale is the largest magnitude in it / 448, at least 2^-126, and an
// element is x * (1 / scale), rounded as above. The scale of a vector of zeros, or of no token, is
// 0. NaN and infinities become NaN, and the scale is that of the other elements.
struct PackKvParams {
  const void* k = nullptr;  // [num_kv_heads, num_tokens, head_dim], of src_dtype
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
  DType dst_dtype = DType::kBf16;  // of the elements; not read if they have scales
  KvScales scales = KvScales::kNone;
  DType src_dtype = DType::kFp32;  // fp32 or bf16: what the device computes in
  void* dst = nullptr;             // PackedBytes() long, aligned for fp32
};

constexpr size_t ElementBytes(const PackKvParams& p) {
  return p.scales == KvScales::kNone ? SizeOf(p.dst_dtype) : 1;
}

// Returns where the scales begin.
constexpr int64_t PackedElementBytes(const PackKvParams& p) {
  return 2 * p.num_blocks * p.block_tokens * p.num_heads * p.head_dim *
         static_cast<int64_t>(ElementBytes(p));
}

constexpr int64_t NumScales(const PackKvParams& p) {
  if (p.scales == KvScales::kNone) return 0;
  return 2 * p.num_blocks * p.num_heads *
         (p.scales == KvScales::kPerToken ? int64_t{p.block_tokens} : 1);
}

constexpr int64_t PackedBytes(const PackKvParams& p) {
  return PackedElementBytes(p) + NumScales(p) * static_cast<int64_t>(sizeof(float));
}

// The distances between neighbours along each axis of an array of the wire, in elements. Those
// along head_dim are next to each other in every order.
struct PackedStrides {
  int64_t tensor;  // from K to V
  int64_t block;
  int64_t token;  // within a block
  int64_t head;
};

constexpr PackedStrides StridesOf(KvOrder order, int64_t num_blocks, int64_t tokens, int64_t heads,
                                  int64_t dim) {
  const int64_t block = tokens * heads * dim;  // of one tensor
  switch (order) {
    case KvOrder::kNhd:
      return {.tensor = num_blocks * block, .block = block, .token = heads * dim, .head = dim};
    case KvOrder::kHnd:
      return {.tensor = num_blocks * block, .block = block, .token = dim, .head = tokens * dim};
    case KvOrder::kNh2d:
      return {.tensor = dim, .block = 2 * block, .token = heads * 2 * dim, .head = 2 * dim};
    case KvOrder::kHn2d:
      break;
  }
  return {.tensor = dim, .block = 2 * block, .token = 2 * dim, .head = tokens * 2 * dim};
}

// Returns the strides of the elements.
constexpr PackedStrides StridesOf(const PackKvParams& p) {
  return StridesOf(p.order, p.num_blocks, p.block_tokens, p.num_heads, p.head_dim);
}

// Returns the strides of the scales. That of a token is 0 where its block has one scale.
constexpr PackedStrides ScaleStridesOf(const PackKvParams& p) {
  const bool per_block = p.scales == KvScales::kPerBlock;
  PackedStrides strides =
      StridesOf(p.order, p.num_blocks, per_block ? 1 : p.block_tokens, p.num_heads, 1);
  if (per_block) strides.token = 0;
  return strides;
}

}  // namespace prefilld::kernels

#endif  // PREFILLD_KERNELS_KV_PACK_H_
