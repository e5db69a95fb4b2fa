#include "model/checkpoint/weight_conversion.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

namespace prefilld::model {
namespace {

using kernels::DType;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float Widen(DType dtype, uint16_t bits) {
  float value = 0;
  ConvertElements(dtype, &bits, DType::kFp32, &value, 1);
  return value;
}

uint16_t Narrow(float value, DType dtype) {
  uint16_t bits = 0;
  ConvertElements(DType::kFp32, &value, dtype, &bits, 1);
  return bits;
}

// Computes the value by the definition of the format, in double precision.
double ValueOf(DType dtype, uint16_t bits) {
  const int fraction_bits = dtype == DType::kBf16 ? 7 : 10;
  const int bias = dtype == DType::kBf16 ? 127 : 15;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const int exponent = (bits & 0x7fff) >> fraction_bits;
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, 1 - bias - fraction_bits)
                    : std::ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits);
  return bits & 0x8000 ? -magnitude : magnitude;
}

class NarrowTypeTest : public testing::TestWithParam<DType> {
 protected:
  uint16_t infinity() const { return GetParam() == DType::kBf16 ? 0x7f80 : 0x7c00; }
};

TEST_P(NarrowTypeTest, EveryValueWidensExactlyAndComesBack) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const auto narrow = static_cast<uint16_t>(bits);
    const float wide = Widen(GetParam(), narrow);
    if ((narrow & 0x7fff) > infinity()) {
      EXPECT_TRUE(std::isnan(wide)) << bits;
      EXPECT_TRUE(std::isnan(Widen(GetParam(), Narrow(wide, GetParam())))) << bits;
      continue;
    }
    if ((narrow & 0x7fff) == infinity()) {
      EXPECT_EQ(wide, bits & 0x8000 ? -kInfinity : kInfinity);
    } else {
      ASSERT_EQ(wide, ValueOf(GetParam(), narrow)) << bits;
    }
    ASSERT_EQ(Narrow(wide, GetParam()), narrow) << bits;
  }
}

TEST_P(NarrowTypeTest, RoundsToNearestAndTiesToEven) {
  for (uint16_t low = 0; low < infinity() - 1; ++low) {
    const auto high = static_cast<uint16_t>(low + 1);
    const auto middle =
        static_cast<float>((ValueOf(GetParam(), low) + ValueOf(GetParam(), high)) / 2);
    ASSERT_EQ(Narrow(middle, GetParam()), low % 2 == 0 ? low : high) << low;
    ASSERT_EQ(Narrow(std::nextafter(middle, 0.0f), GetParam()), low) << low;
    ASSERT_EQ(Narrow(std::nextafter(middle, kInfinity), GetParam()), high) << low;
    ASSERT_EQ(Narrow(-middle, GetParam()), 0x8000 | (low % 2 == 0 ? low : high)) << low;
  }
}

TEST_P(NarrowTypeTest, OverflowsToInfinity) {
  EXPECT_EQ(Narrow(std::numeric_limits<float>::max(), GetParam()), infinity());
  EXPECT_EQ(Narrow(-kInfinity, GetParam()), 0x8000 | infinity());
}

INSTANTIATE_TEST_SUITE_P(, NarrowTypeTest, testing::Values(DType::kBf16, DType::kFp16),
                         [](const auto& info) { return Name(info.param); });

TEST(ConvertElements, CopiesEqualTypesBitByBit) {
  const std::vector<uint32_t> signalling = {0x7fa00001, 0x80000000, 0x3f800000};
  std::vector<uint32_t> copy(signalling.size());
  ConvertElements(DType::kFp32, signalling.data(), DType::kFp32, copy.data(), 3);
  EXPECT_EQ(copy, signalling);
}

TEST(ConvertElements, ConvertsBetweenTheNarrowTypes) {
  const uint16_t fp16 = 0x3c01;  // 1 + 2^-10 rounds to 1 in bf16
  uint16_t bf16 = 0;
  ConvertElements(DType::kFp16, &fp16, DType::kBf16, &bf16, 1);
  EXPECT_EQ(bf16, 0x3f80);
}

}  // namespace
}  // namespace prefilld::model
