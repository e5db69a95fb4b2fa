// Sizes and orders of the KV cache on the wire, as prefill/v1/kv.proto defines them.
//
// A layer has two tensors, K and V. One block of a layer therefore takes twice KvTensorBytes, in
// every order. Frames, whose payload holds both, count in KvPairBytes. Both include the scales,
// which lie behind the elements of all blocks of a frame.
#ifndef PREFILLD_PROTO_WIRE_KV_LAYOUT_H_
#define PREFILLD_PROTO_WIRE_KV_LAYOUT_H_

#include <algorithm>
#include <array>
#include <cstdint>

#include "prefill/v1/kv.pb.h"

namespace prefilld::wire {

// The numbers of tokens that a block may have, and how messages and help texts list them.
inline constexpr std::array<uint32_t, 4> kBlockTokens = {16, 32, 64, 128};
inline constexpr char kBlockTokensList[] = "16, 32, 64, 128";
inline constexpr uint32_t kDefaultBlockTokens = kBlockTokens.front();
inline constexpr uint32_t kMaxBlockTokens = kBlockTokens.back();

constexpr bool IsBlockTokens(int64_t num_tokens) {
  return std::find(kBlockTokens.begin(), kBlockTokens.end(), num_tokens) != kBlockTokens.end();
}

// The orders of a block's axes that this version knows, as messages list them.
inline constexpr char kKvOrdersList[] = "NHD, HND, NH2D, HN2D";
bool IsKvOrder(::prefill::v1::KvOrder order);

// The types of elements and the scales that this version knows, as messages list them.
inline constexpr char kKvDTypesList[] = "BF16, FP16, FP32, FP8_E4M3";
inline constexpr char kKvScalesList[] = "PER_TOKEN, PER_BLOCK";
// Tells whether elements of this type stand for themselves times a scale.
bool HasScales(::prefill::v1::DType dtype);
bool IsKvScales(::prefill::v1::KvScales scales);

// The distances between neighbours along each axis of a frame's elements, or of its scales, counted
// in these. Elements along head_dim are next to each other in every order.
struct PayloadStrides {
  int64_t tensor = 0;  // from K to V
  int64_t block = 0;
  int64_t token = 0;  // within a block
  int64_t head = 0;
};
// `num_blocks` is that of the frame. The layout's order must be known.
PayloadStrides StridesOf(const ::prefill::v1::KvLayout& layout, int64_t num_blocks);
// Returns the strides of the scales. That of a token is 0 where its block has one scale.
PayloadStrides ScaleStridesOf(const ::prefill::v1::KvLayout& layout, int64_t num_blocks);
// Returns where in the payload of a frame its scales begin, in bytes: its end if it has none.
int64_t ScalesOffset(const ::prefill::v1::KvLayout& layout, int64_t num_blocks);

// Returns 0 for a type that this version does not know.
int64_t BytesPerElement(::prefill::v1::DType dtype);

// Returns the bytes of one block of one layer, K or V, with the layout's range of heads.
int64_t KvTensorBytes(const ::prefill::v1::KvLayout& layout);
// Returns the bytes of one block of one layer, K and V together.
int64_t KvPairBytes(const ::prefill::v1::KvLayout& layout);
// Returns the largest KvPairBytes of any layout of a model: all its heads, the largest block, fp32.
int64_t MaxKvPairBytes(int64_t num_kv_heads, int64_t head_dim);

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_KV_LAYOUT_H_
