#include "kernels/cpu/simd_targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/kv_pack.cc"
#include "hwy/foreach_target.h"
// foreach_target.h comes first.
#include <algorithm>
#include <cstring>

#include "hwy/highway.h"
#include "kernels/cpu/ops.h"

HWY_BEFORE_NAMESPACE();
namespace prefilld::kernels::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::ScalableTag<float>;
using U32 = hn::Rebind<uint32_t, F32>;
using U16 = hn::Rebind<uint16_t, F32>;

// Converts to bf16. This and the next conversion work on the bits, so that every instruction set
// rounds alike.
HWY_INLINE hn::Vec<U32> Bf16Bits(hn::Vec<F32> x) {
  const U32 du;
  const auto bits = hn::BitCast(du, x);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fff)));
  // Rounding could carry a NaN into infinity: set its quiet bit instead.
  const auto nan = hn::Or(bits, hn::Set(du, 0x00400000));
  return hn::ShiftRight<16>(hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(x)), nan, rounded));
}

// Converts to fp16.
HWY_INLINE hn::Vec<U32> Fp16Bits(hn::Vec<F32> x) {
  const F32 d;
  const U32 du;
  const auto bits = hn::BitCast(du, x);
  const auto sign = hn::And(bits, hn::Set(du, 0x80000000u));
  const auto magnitude = hn::Xor(bits, sign);
  const auto abs = hn::BitCast(d, magnitude);
  // Normal results: move the exponent's bias and round the 13 dropped bits; too large a value
  // ends with an exponent of infinity or beyond.
  const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(du, 1));
  const auto rebiased = hn::Sub(magnitude, hn::Set(du, 112u << 23));
  auto half = hn::ShiftRight<13>(hn::Add(rebiased, hn::Add(odd, hn::Set(du, 0xfff))));
  // Subnormal results: adding 0.5 leaves multiples of 2^-24 in the low mantissa bits, rounded.
  const auto half_float = hn::Set(d, 0.5f);
  const auto subnormal =
      hn::Sub(hn::BitCast(du, hn::Add(abs, half_float)), hn::BitCast(du, half_float));
  half = hn::IfThenElse(hn::RebindMask(du, hn::Lt(abs, hn::Set(d, 0x1p-14f))), subnormal, half);
  half = hn::IfThenElse(hn::RebindMask(du, hn::Ge(abs, hn::Set(d, 65520.0f))), hn::Set(du, 0x7c00),
                        half);
  half = hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(x)), hn::Set(du, 0x7e00), half);
  return hn::Or(half, hn::ShiftRight<16>(sign));
}

// n is a multiple of 16, as every head_dim is.
template <bool kBf16>
HWY_INLINE void ConvertRow(const float* HWY_RESTRICT from, size_t n, uint16_t* HWY_RESTRICT to) {
  const F32 d;
  const U16 d16;
  for (size_t i = 0; i < n; i += hn::Lanes(d)) {
    const auto x = hn::LoadU(d, from + i);
    hn::StoreU(hn::TruncateTo(d16, kBf16 ? Bf16Bits(x) : Fp16Bits(x)), d16, to + i);
  }
}

// Widens bf16 to fp32, n as above.
HWY_INLINE void WidenRow(const uint16_t* HWY_RESTRICT from, size_t n, float* HWY_RESTRICT to) {
  const F32 d;
  const U16 d16;
  const U32 d32;
  for (size_t i = 0; i < n; i += hn::Lanes(d)) {
    const auto bits = hn::PromoteTo(d32, hn::LoadU(d16, from + i));
    hn::StoreU(hn::BitCast(d, hn::ShiftLeft<16>(bits)), d, to + i);
  }
}

// Packs one head of one block of K or V. Its tokens are stride_bytes apart.
void PackHead(const PackKvParams& p, const float* from, int64_t stride_bytes, uint8_t* to,
              int64_t num_tokens) {
  const size_t n = static_cast<size_t>(p.head_dim);
  for (int64_t t = 0; t < num_tokens; ++t, from += p.head_dim, to += stride_bytes) {
    switch (p.dst_dtype) {
      case DType::kBf16:
        ConvertRow<true>(from, n, reinterpret_cast<uint16_t*>(to));
        break;
      case DType::kFp16:
        ConvertRow<false>(from, n, reinterpret_cast<uint16_t*>(to));
        break;
      case DType::kFp32:
        std::memcpy(to, from, n * sizeof(float));
        break;
    }
  }
  for (int64_t t = num_tokens; t < p.block_tokens; ++t, to += stride_bytes) {
    std::memset(to, 0, n * SizeOf(p.dst_dtype));
  }
}

// Packs a row of bf16.
void PackBf16Row(const uint16_t* from, size_t n, DType dtype, uint8_t* to) {
  if (dtype == DType::kBf16) {
    std::memcpy(to, from, n * sizeof(uint16_t));
  } else if (dtype == DType::kFp32) {
    WidenRow(from, n, reinterpret_cast<float*>(to));
  } else {
    constexpr size_t kPart = 64;
    float wide[kPart];
    for (size_t i = 0; i < n; i += kPart) {
      const size_t count = std::min(kPart, n - i);
      WidenRow(from + i, count, wide);
      ConvertRow<false>(wide, count, reinterpret_cast<uint16_t*>(to) + i);
    }
  }
}

// Packs one head of one whole block of K or V, of bf16.
void PackBf16Head(const PackKvParams& p, const uint16_t* from, int64_t stride_bytes, uint8_t* to) {
  const auto n = static_cast<size_t>(p.head_dim);
  const size_t row_bytes = n * sizeof(uint16_t);
  if (p.dst_dtype == DType::kBf16 && stride_bytes == static_cast<int64_t>(row_bytes)) {
    std::memcpy(to, from, static_cast<size_t>(p.block_tokens) * row_bytes);
    return;
  }
  for (int t = 0; t < p.block_tokens; ++t, from += n, to += stride_bytes) {
    PackBf16Row(from, n, p.dst_dtype, to);
  }
}

void PackPagedBlocks(const PackKvParams& p, const KvPages& pages) {
  const auto bytes = static_cast<int64_t>(SizeOf(p.dst_dtype));
  const PackedStrides strides = StridesOf(p);
  uint8_t* tensor = static_cast<uint8_t*>(p.dst);
  for (const void* src : {p.k, p.v}) {
    for (int64_t b = 0; b < p.num_blocks; ++b) {
      const int64_t first_token = (p.first_block + b) * p.block_tokens;
      const int64_t row =
          int64_t{pages.pages[first_token / pages.page_tokens]} * pages.page_tokens +
          first_token % pages.page_tokens;
      for (int64_t h = 0; h < p.num_heads; ++h) {
        const int64_t first = (p.first_head + h) * p.kv_head_stride + row * p.head_dim;
        uint8_t* to = tensor + (b * strides.block + h * strides.head) * bytes;
        if (pages.dtype == DType::kBf16) {
          PackBf16Head(p, static_cast<const uint16_t*>(src) + first, strides.token * bytes, to);
        } else {
          PackHead(p, static_cast<const float*>(src) + first, strides.token * bytes, to,
                   p.block_tokens);
        }
      }
    }
    tensor += strides.tensor * bytes;
  }
}

void PackBlocks(const PackKvParams& p) {
  const auto bytes = static_cast<int64_t>(SizeOf(p.dst_dtype));
  const PackedStrides strides = StridesOf(p);
  uint8_t* tensor = static_cast<uint8_t*>(p.dst);
  for (const void* src : {p.k, p.v}) {
    for (int64_t b = 0; b < p.num_blocks; ++b) {
      const int64_t first_token = (p.first_block + b) * p.block_tokens;
      const int64_t tokens = std::clamp<int64_t>(p.num_tokens - first_token, 0, p.block_tokens);
      for (int64_t h = 0; h < p.num_heads; ++h) {
        const float* from = static_cast<const float*>(src) + (p.first_head + h) * p.kv_head_stride +
                            first_token * p.head_dim;
        PackHead(p, from, strides.token * bytes,
                 tensor + (b * strides.block + h * strides.head) * bytes, tokens);
      }
    }
    tensor += strides.tensor * bytes;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace prefilld::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace prefilld::kernels::cpu {

HWY_EXPORT(PackBlocks);
HWY_EXPORT(PackPagedBlocks);

void PackKv(const PackKvParams& params) { HWY_DYNAMIC_DISPATCH(PackBlocks)(params); }

void PackPagedKv(const PackKvParams& params, const KvPages& pages) {
  HWY_DYNAMIC_DISPATCH(PackPagedBlocks)(params, pages);
}

}  // namespace prefilld::kernels::cpu
#endif
