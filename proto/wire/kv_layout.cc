#include "proto/wire/kv_layout.h"

namespace prefilld::wire {

using ::prefill::v1::DType;
using ::prefill::v1::KvLayout;
using ::prefill::v1::KvOrder;

bool IsKvOrder(KvOrder order) {
  return order != KvOrder::KV_ORDER_UNSPECIFIED && ::prefill::v1::KvOrder_IsValid(order);
}

PayloadStrides StridesOf(const KvLayout& layout, int64_t num_blocks) {
  const bool interleaved =
      layout.order() == KvOrder::KV_ORDER_NH2D || layout.order() == KvOrder::KV_ORDER_HN2D;
  const bool by_token =
      layout.order() == KvOrder::KV_ORDER_NHD || layout.order() == KvOrder::KV_ORDER_NH2D;
  const int64_t row = int64_t{layout.head_dim()} * (interleaved ? 2 : 1);  // of a token and a head
  const int64_t block = row * layout.block_tokens() * layout.num_heads();
  return {.tensor = interleaved ? int64_t{layout.head_dim()} : num_blocks * block,
          .block = block,
          .token = by_token ? row * layout.num_heads() : row,
          .head = by_token ? row : row * layout.block_tokens()};
}

int64_t BytesPerElement(DType dtype) {
  switch (dtype) {
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
  return int64_t{layout.block_tokens()} * layout.num_heads() * layout.head_dim() *
         BytesPerElement(layout.dtype());
}

int64_t KvPairBytes(const KvLayout& layout) { return 2 * KvTensorBytes(layout); }

int64_t MaxKvPairBytes(int64_t num_kv_heads, int64_t head_dim) {
  return 2 * int64_t{kMaxBlockTokens} * num_kv_heads * head_dim *
         BytesPerElement(DType::DTYPE_FP32);
}

}  // namespace prefilld::wire
