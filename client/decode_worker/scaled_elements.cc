#include "client/decode_worker/scaled_elements.h"

#include <bit>
#include <cstring>

#include "proto/wire/e4m3.h"
#include "proto/wire/kv_layout.h"

namespace prefilld::client {
namespace {

// Rounds to the nearest, ties to even; a NaN stays one.
uint16_t ToBf16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Writes the elements of one token and head.
void UnscaleRow(const uint8_t* from, int64_t count, float scale, kernels::DType to, uint8_t* out) {
  if (to == kernels::DType::kBf16) {
    auto* bf16 = reinterpret_cast<uint16_t*>(out);
    for (int64_t i = 0; i < count; ++i) bf16[i] = ToBf16(wire::kE4m3Values[from[i]] * scale);
    return;
  }
  auto* fp32 = reinterpret_cast<float*>(out);
  for (int64_t i = 0; i < count; ++i) fp32[i] = wire::kE4m3Values[from[i]] * scale;
}

}  // namespace

void Unscale(const ::prefill::v1::KvLayout& layout, int64_t num_blocks, bool is_value,
             const uint8_t* payload, kernels::DType to, uint8_t* out) {
  const wire::PayloadStrides strides = wire::StridesOf(layout, num_blocks);
  const wire::PayloadStrides scale_strides = wire::ScaleStridesOf(layout, num_blocks);
  const uint8_t* elements = payload + (is_value ? strides.tensor : 0);
  const uint8_t* scales = payload + wire::ScalesOffset(layout, num_blocks) +
                          (is_value ? scale_strides.tensor : 0) * sizeof(float);
  const auto out_bytes = static_cast<int64_t>(kernels::SizeOf(to));
  for (int64_t block = 0; block < num_blocks; ++block) {
    for (int64_t token = 0; token < layout.block_tokens(); ++token) {
      for (int64_t head = 0; head < layout.num_heads(); ++head) {
        const int64_t at = block * strides.block + token * strides.token + head * strides.head;
        const int64_t scale_at =
            block * scale_strides.block + token * scale_strides.token + head * scale_strides.head;
        float scale;  // the payload may lie at any address
        std::memcpy(&scale, scales + scale_at * static_cast<int64_t>(sizeof(scale)), sizeof(scale));
        UnscaleRow(elements + at, layout.head_dim(), scale, to, out + at * out_bytes);
      }
    }
  }
}

}  // namespace prefilld::client
