#include "model/checkpoint/weight_conversion.h"

#include <bit>
#include <cstddef>
#include <cstring>

namespace prefilld::model {
namespace {

using kernels::DType;

// The storage types of the three formats. ToFloat and FromFloat have no branches, so that loops
// over them become vector code.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

float ToFloat(Bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
float ToFloat(float x) { return x; }

float ToFloat(Fp16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Exponent and fraction, moved into the places of fp32, give a number 2^112 times too small.
  // Multiplying by 2^112 also normalises subnormals.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = (magnitude << 13) | 0x7f800000u;  // infinity and NaN
  const uint32_t bits = magnitude >= 0x7c00u ? special : std::bit_cast<uint32_t>(scaled);
  return std::bit_cast<float>(bits | sign);
}

void FromFloat(float x, float& y) { y = x; }

void FromFloat(float x, Bf16& y) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  y.bits = static_cast<uint16_t>((is_nan ? bits | 0x00400000u : rounded) >> 16);
}

void FromFloat(float x, Fp16& y) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // In the normal range, this moves the exponent's bias from 127 to 15 and rounds away 13 bits.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14, adding 0.5 leaves the rounded bits of fp16's subnormal grid at the bottom.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds past 65504
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  y.bits = static_cast<uint16_t>(half | sign);
}

template <typename Src, typename Dst>
void Convert(const void* src, void* dst, int64_t count) {
  const auto* from = static_cast<const std::byte*>(src);
  Dst* to = static_cast<Dst*>(dst);
  for (int64_t i = 0; i < count; ++i) {
    Src element;  // memcpy, because `from` may be at any address; it becomes one load
    std::memcpy(&element, from + static_cast<size_t>(i) * sizeof(Src), sizeof(Src));
    FromFloat(ToFloat(element), to[i]);
  }
}

template <typename Src>
void ConvertFrom(const void* src, DType dst_dtype, void* dst, int64_t count) {
  switch (dst_dtype) {
    case DType::kBf16:
      return Convert<Src, Bf16>(src, dst, count);
    case DType::kFp16:
      return Convert<Src, Fp16>(src, dst, count);
    case DType::kFp32:
      return Convert<Src, float>(src, dst, count);
  }
}

}  // namespace

void ConvertElements(DType src_dtype, const void* src, DType dst_dtype, void* dst, int64_t count) {
  if (src_dtype == dst_dtype) {
    std::memcpy(dst, src, static_cast<size_t>(count) * SizeOf(src_dtype));
    return;
  }
  switch (src_dtype) {
    case DType::kBf16:
      return ConvertFrom<Bf16>(src, dst_dtype, dst, count);
    case DType::kFp16:
      return ConvertFrom<Fp16>(src, dst_dtype, dst, count);
    case DType::kFp32:
      return ConvertFrom<float>(src, dst_dtype, dst, count);
  }
}

}  // namespace prefilld::model
