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

// Converts to e4m3; |x| must be below 464, from where on it would be rounded up to a NaN.
HWY_INLINE hn::Vec<U32> E4m3Bits(hn::Vec<F32> x) {
  const F32 d;
  const U32 du;
  const auto bits = hn::BitCast(du, x);
  const auto sign = hn::And(bits, hn::Set(du, 0x80000000u));
  const auto magnitude = hn::Xor(bits, sign);
  const auto abs = hn::BitCast(d, magnitude);
  // Normal results, as in fp16: 20 bits are dropped, and the bias goes from 127 to 7.
  const auto odd = hn::And(hn::ShiftRight<20>(magnitude), hn::Set(du, 1));
  const auto rebiased = hn::Sub(magnitude, hn::Set(du, 120u << 23));
  auto e4m3 = hn::ShiftRight<20>(hn::Add(rebiased, hn::Add(odd, hn::Set(du, 0x7ffff))));
  // Subnormal results: adding 2^14 leaves multiples of 2^-9 in the low mantissa bits, rounded.
  const auto unit = hn::Set(d, 0x1p14f);
  const auto subnormal = hn::Sub(hn::BitCast(du, hn::Add(abs, unit)), hn::BitCast(du, unit));
  e4m3 = hn::IfThenElse(hn::RebindMask(du, hn::Lt(abs, hn::Set(d, 0x1p-6f))), subnormal, e4m3);
  return hn::Or(e4m3, hn::ShiftRight<24>(sign));
}

HWY_INLINE hn::Vec<F32> Load(const float* from) { return hn::LoadU(F32(), from); }

// The source is bf16.
HWY_INLINE hn::Vec<F32> Load(const uint16_t* from) {
  const auto bits = hn::PromoteTo(U32(), hn::LoadU(U16(), from));
  return hn::BitCast(F32(), hn::ShiftLeft<16>(bits));
}

// In this and the next functions n is a multiple of 16, as every head_dim is.
template <typename From>
HWY_INLINE void ConvertRow(const From* HWY_RESTRICT from, size_t n, DType dtype,
                           uint8_t* HWY_RESTRICT to) {
  const F32 d;
  const U16 d16;
  constexpr bool kFromBf16 = sizeof(From) == 2;
  if (dtype == (kFromBf16 ? DType::kBf16 : DType::kFp32)) {
    std::memcpy(to, from, n * sizeof(From));
    return;
  }
  auto* halves = reinterpret_cast<uint16_t*>(to);
  for (size_t i = 0; i < n; i += hn::Lanes(d)) {
    const auto x = Load(from + i);
    if (dtype == DType::kFp32) {
      hn::StoreU(x, d, reinterpret_cast<float*>(to) + i);
    } else {
      const auto bits = dtype == DType::kBf16 ? Bf16Bits(x) : Fp16Bits(x);
      hn::StoreU(hn::TruncateTo(d16, bits), d16, halves + i);
    }
  }
}

// Returns the largest finite magnitude.
template <typename From>
HWY_INLINE float Largest(const From* HWY_RESTRICT from, size_t n) {
  const F32 d;
  const auto infinity = hn::Inf(d);
  auto largest = hn::Zero(d);
  for (size_t i = 0; i < n; i += hn::Lanes(d)) {
    const auto abs = hn::Abs(Load(from + i));
    largest = hn::Max(largest, hn::IfThenElseZero(hn::Lt(abs, infinity), abs));
  }
  return hn::GetLane(hn::MaxOfLanes(d, largest));
}

template <typename From>
HWY_INLINE void ScaleRow(const From* HWY_RESTRICT from, size_t n, float inverse,
                         uint8_t* HWY_RESTRICT to) {
  const F32 d;
  const U32 du;
  const hn::Rebind<uint8_t, F32> d8;
  const auto factor = hn::Set(d, inverse);
  for (size_t i = 0; i < n; i += hn::Lanes(d)) {
    const auto x = Load(from + i);
    const auto sign = hn::ShiftRight<24>(hn::And(hn::BitCast(du, x), hn::Set(du, 0x80000000u)));
    const auto is_finite = hn::RebindMask(du, hn::Lt(hn::Abs(x), hn::Inf(d)));
    const auto bits =
        hn::IfThenElse(is_finite, E4m3Bits(hn::Mul(x, factor)), hn::Or(sign, hn::Set(du, 0x7f)));
    hn::StoreU(hn::TruncateTo(d8, bits), d8, to + i);
  }
}

float ScaleOf(float largest) {
  return largest == 0.0f ? 0.0f : std::max(largest / 448.0f, 0x1p-126f);
}

// Packs one head of one block of K or V, whose tokens are stride_bytes apart.
template <typename From>
void PackHead(const PackKvParams& p, const From* from, int64_t stride_bytes, uint8_t* to,
              int64_t num_tokens) {
  const size_t n = static_cast<size_t>(p.head_dim);
  if (p.dst_dtype == p.src_dtype && stride_bytes == static_cast<int64_t>(n * sizeof(From))) {
    std::memcpy(to, from, static_cast<size_t>(num_tokens) * n * sizeof(From));
    return;
  }
  for (int64_t t = 0; t < num_tokens; ++t, from += n, to += stride_bytes) {
    ConvertRow(from, n, p.dst_dtype, to);
  }
}

// Packs one head of one block of K or V in fp8. Its scales are scale_stride apart, 0 if it has one.
template <typename From>
void ScaleHead(const PackKvParams& p, const From* from, int64_t stride, uint8_t* to,
               int64_t scale_stride, float* scales, int64_t num_tokens) {
  const size_t n = static_cast<size_t>(p.head_dim);
  const int64_t vector_tokens = scale_stride == 0 ? num_tokens : 1;
  for (int64_t t = 0; t < num_tokens; t += vector_tokens, scales += scale_stride) {
    const float scale = ScaleOf(Largest(from, n * static_cast<size_t>(vector_tokens)));
    const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
    *scales = scale;
    for (int64_t i = 0; i < vector_tokens; ++i, from += n, to += stride) {
      ScaleRow(from, n, inverse, to);
    }
  }
}

void ZeroTokens(const PackKvParams& p, int64_t stride_bytes, uint8_t* to, int64_t num_tokens) {
  for (int64_t t = 0; t < num_tokens; ++t, to += stride_bytes) {
    std::memset(to, 0, static_cast<size_t>(p.head_dim) * ElementBytes(p));
  }
}

// Returns the row of a token within its head: the token itself, or where it lies in pages.
int64_t RowOf(const KvPages* pages, int64_t token) {
  if (pages == nullptr) return token;
  return int64_t{pages->pages[token / pages->page_tokens]} * pages->page_tokens +
         token % pages->page_tokens;
}

template <typename From>
void PackFrom(const PackKvParams& p, const KvPages* pages) {
  const auto bytes = static_cast<int64_t>(ElementBytes(p));
  const PackedStrides strides = StridesOf(p), scale_strides = ScaleStridesOf(p);
  auto* const dst = static_cast<uint8_t*>(p.dst);
  auto* const scales = reinterpret_cast<float*>(dst + PackedElementBytes(p));
  std::fill_n(scales, NumScales(p), 0.0f);
  for (int tensor = 0; tensor < 2; ++tensor) {
    const auto* source = static_cast<const From*>(tensor == 0 ? p.k : p.v);
    for (int64_t b = 0; b < p.num_blocks; ++b) {
      const int64_t first_token = (p.first_block + b) * p.block_tokens;
      const int64_t tokens = std::clamp<int64_t>(p.num_tokens - first_token, 0, p.block_tokens);
      const int64_t first_row = RowOf(pages, first_token);
      for (int64_t h = 0; h < p.num_heads; ++h) {
        const From* from = source + (p.first_head + h) * p.kv_head_stride + first_row * p.head_dim;
        uint8_t* to =
            dst + (tensor * strides.tensor + b * strides.block + h * strides.head) * bytes;
        if (p.scales == KvScales::kNone) {
          PackHead(p, from, strides.token * bytes, to, tokens);
        } else {
          ScaleHead(p, from, strides.token, to, scale_strides.token,
                    scales + tensor * scale_strides.tensor + b * scale_strides.block +
                        h * scale_strides.head,
                    tokens);
        }
        ZeroTokens(p, strides.token * bytes, to + tokens * strides.token * bytes,
                   p.block_tokens - tokens);
      }
    }
  }
}

void PackBlocks(const PackKvParams& p, const KvPages* pages) {
  if (p.src_dtype == DType::kBf16) {
    PackFrom<uint16_t>(p, pages);
  } else {
    PackFrom<float>(p, pages);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace prefilld::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace prefilld::kernels::cpu {

HWY_EXPORT(PackBlocks);

void PackKv(const PackKvParams& params) { HWY_DYNAMIC_DISPATCH(PackBlocks)(params, nullptr); }

void PackPagedKv(const PackKvParams& params, const KvPages& pages) {
  HWY_DYNAMIC_DISPATCH(PackBlocks)(params, &pages);
}

}  // namespace prefilld::kernels::cpu
#endif
