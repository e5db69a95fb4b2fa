#include "proto/wire/kv_layout.h"

namespace prefilld::wire {

using ::prefill::v1::DType;
using ::prefill::v1::KvLayout;

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
