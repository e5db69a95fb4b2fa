#include "proto/wire/kv_layout.h"

namespace prefilld::wire {

using ::prefill::v1::DType;
using ::prefill::v1::KvLayout;
using ::prefill::v1::KvOrder;
using ::prefill::v1::KvScales;

namespace {

int64_t ElementsOfBlock(const KvLayout& layout) {  // K or V
  return int64_t{layout.block_tokens()} * layout.num_heads() * layout.head_dim();
}

int64_t ScalesOfBlock(const KvLayout& layout) {  // K or V
  if (!HasScales(layout.dtype())) return 0;
  const bool per_block = layout.scales() == KvScales::KV_SCALES_PER_BLOCK;
  return int64_t{layout.num_heads()} * (per_block ? 1 : layout.block_tokens());
}

PayloadStrides Strides(const KvLayout& layout, int64_t num_blocks, int64_t tokens, int64_t dim) {
  const bool interleaved =
      layout.order() == KvOrder::KV_ORDER_NH2D || layout.order() == KvOrder::KV_ORDER_HN2D;
  const bool by_token =
      layout.order() == KvOrder::KV_ORDER_NHD || layout.order() == KvOrder::KV_ORDER_NH2D;
  const int64_t row = dim * (interleaved ? 2 : 1);  // of a token and a head
  const int64_t block = row * tokens * layout.num_heads();
  return {.tensor = interleaved ? dim : num_blocks * block,
          .block = block,
          .token = by_token ? row * layout.num_heads() : row,
          .head = by_token ? row : row * tokens};
}

}  // namespace

bool IsKvOrder(KvOrder order) {
  return order != KvOrder::KV_ORDER_UNSPECIFIED && ::prefill::v1::KvOrder_IsValid(order);
}

bool HasScales(DType dtype) { return dtype == DType::DTYPE_FP8_E4M3; }

bool IsKvScales(KvScales scales) {
  return scales != KvScales::KV_SCALES_UNSPECIFIED && ::prefill::v1::KvScales_IsValid(scales);
}

PayloadStrides StridesOf(const KvLayout& layout, int64_t num_blocks) {
  return Strides(layout, num_blocks, layout.block_tokens(), layout.head_dim());
}

PayloadStrides ScaleStridesOf(const KvLayout& layout, int64_t num_blocks) {
  const bool per_block = layout.scales() == KvScales::KV_SCALES_PER_BLOCK;
  PayloadStrides strides = Strides(layout, num_blocks, per_block ? 1 : layout.block_tokens(), 1);
  if (per_block) strides.token = 0;
  return strides;
}

int64_t ScalesOffset(const KvLayout& layout, int64_t num_blocks) {
  return 2 * num_blocks * ElementsOfBlock(layout) * BytesPerElement(layout.dtype());
}

int64_t BytesPerElement(DType dtype) {
  switch (dtype) {
    case DType::DTYPE_FP8_E4M3:
      return 1;
    case DType::DTYPE_BF16:
    case DType::DTYPE_FP16:
      return 2;
    case DType::DTYPE_FP32:
      return 4;
    default:
      return 0;
  }
}

int64_t KvTensorBytes(const KvLayout& layout) {
  return ElementsOfBlock(layout) * BytesPerElement(layout.dtype()) +
         ScalesOfBlock(layout) * static_cast<int64_t>(sizeof(float));
}

int64_t KvPairBytes(const KvLayout& layout) { return 2 * KvTensorBytes(layout); }

int64_t MaxKvPairBytes(int64_t num_kv_heads, int64_t head_dim) {
  return 2 * int64_t{kMaxBlockTokens} * num_kv_heads * head_dim *
         BytesPerElement(DType::DTYPE_FP32);
}

}  // namespace prefilld::wire
