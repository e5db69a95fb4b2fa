#include "kernels/cpu/ops.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tests/kernels/cases.h"
#include "tests/kernels/reference_layer_ops.h"

namespace prefilld::kernels::testing {
namespace {

using Wire = std::pair<DType, KvScales>;
constexpr Wire kWires[] = {{DType::kBf16, KvScales::kNone},
                           {DType::kFp16, KvScales::kNone},
                           {DType::kFp32, KvScales::kNone},
                           {DType::kBf16, KvScales::kPerToken},
                           {DType::kBf16, KvScales::kPerBlock}};

std::string NameOf(const PackKvParams& p) {
  const std::string name = p.scales == KvScales::kNone       ? Name(p.dst_dtype)
                           : p.scales == KvScales::kPerToken ? "fp8 per token"
                                                             : "fp8 per block";
  return name + " of " + Name(p.src_dtype) + " in order " +
         std::to_string(static_cast<int>(p.order));
}

std::vector<uint16_t> Bf16Of(const std::vector<float>& values) {
  std::vector<uint16_t> bits;
  for (const float x : values) bits.push_back(reference::ToBf16(x));
  return bits;
}

std::vector<char> Pack(void (*op)(const PackKvParams&), PackKvParams p) {
  std::vector<char> bytes(static_cast<size_t>(PackedBytes(p)) + 8, 0x55);
  p.dst = bytes.data();
  op(p);
  return bytes;  // eight bytes longer, to show writes past the end
}

class CpuPackKv : public ::testing::TestWithParam<PackCase> {};

TEST_P(CpuPackKv, GivesTheBytesOfTheReference) {
  const PackCase& c = GetParam();
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  // The distance between heads has room for two more tokens.
  const int64_t stride = (c.num_tokens + 2) * c.head_dim;
  std::vector<float> k(static_cast<size_t>(c.num_kv_heads * stride)), v(k.size());
  for (float& x : k) x = normal(random);
  for (float& x : v) x = normal(random);
  const std::vector<uint16_t> bf16_k = Bf16Of(k), bf16_v = Bf16Of(v);
  for (const KvOrder order : kPackOrders) {
    for (const auto& [dtype, scales] : kWires) {
      PackKvParams p;
      p.k = k.data();
      p.v = v.data();
      p.kv_head_stride = stride;
      p.num_tokens = c.num_tokens;
      p.first_block = c.first_block;
      p.num_blocks = c.num_blocks;
      p.block_tokens = c.block_tokens;
      p.first_head = c.first_head;
      p.num_heads = c.num_heads;
      p.head_dim = c.head_dim;
      p.order = order;
      p.dst_dtype = dtype;
      p.scales = scales;
      EXPECT_EQ(Pack(cpu::PackKv, p), Pack(reference::PackKv, p)) << NameOf(p);
      p.src_dtype = DType::kBf16;
      p.k = bf16_k.data();
      p.v = bf16_v.data();
      EXPECT_EQ(Pack(cpu::PackKv, p), Pack(reference::PackKv, p)) << NameOf(p);
    }
  }
}

// Pages in a mixed order hold what plain memory holds.
TEST_P(CpuPackKv, PacksPagesLikePlainMemory) {
  const PackCase& c = GetParam();
  constexpr int kPageTokens = 128;
  const int64_t num_pages = CeilDiv((c.first_block + c.num_blocks) * c.block_tokens, kPageTokens);
  const int64_t page = kPageTokens * c.head_dim, stride = num_pages * page;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  // Numbers of bf16 are the same in either dtype.
  std::vector<float> kv[2], paged[2];
  std::vector<uint16_t> paged_bf16[2];
  std::vector<int> pages(static_cast<size_t>(num_pages));
  std::iota(pages.begin(), pages.end(), 0);
  std::shuffle(pages.begin(), pages.end(), random);
  for (const int tensor : {0, 1}) {
    kv[tensor].resize(static_cast<size_t>(c.num_kv_heads * stride));
    for (float& x : kv[tensor]) {
      x = std::bit_cast<float>(std::bit_cast<uint32_t>(normal(random)) & 0xffff0000u);
    }
    paged[tensor].resize(kv[tensor].size());
    for (int64_t head = 0; head < c.num_kv_heads; ++head) {
      for (int64_t p = 0; p < num_pages; ++p) {
        const float* from = &kv[tensor][static_cast<size_t>(head * stride + p * page)];
        std::copy(from, from + page,
                  &paged[tensor][static_cast<size_t>(head * stride +
                                                     pages[static_cast<size_t>(p)] * page)]);
      }
    }
    for (const float x : paged[tensor]) {
      paged_bf16[tensor].push_back(static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16));
    }
  }
  for (const KvOrder order : kPackOrders) {
    for (const auto& [dtype, scales] : kWires) {
      PackKvParams p;
      p.kv_head_stride = stride;
      p.num_tokens = num_pages * kPageTokens;
      p.first_block = c.first_block;
      p.num_blocks = c.num_blocks;
      p.block_tokens = c.block_tokens;
      p.first_head = c.first_head;
      p.num_heads = c.num_heads;
      p.head_dim = c.head_dim;
      p.order = order;
      p.dst_dtype = dtype;
      p.scales = scales;
      p.k = kv[0].data();
      p.v = kv[1].data();
      const std::vector<char> expected = Pack(reference::PackKv, p);
      for (const DType from : {DType::kFp32, DType::kBf16}) {
        const bool is_bf16 = from == DType::kBf16;
        p.src_dtype = from;
        p.k = is_bf16 ? static_cast<const void*>(paged_bf16[0].data()) : paged[0].data();
        p.v = is_bf16 ? static_cast<const void*>(paged_bf16[1].data()) : paged[1].data();
        std::vector<char> bytes(static_cast<size_t>(PackedBytes(p)) + 8, 0x55);
        p.dst = bytes.data();
        cpu::PackPagedKv(p, {.pages = pages.data(), .page_tokens = kPageTokens});
        EXPECT_EQ(bytes, expected) << NameOf(p);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Common, CpuPackKv, ::testing::ValuesIn(PackCases()),
                         CaseName<::testing::TestParamInfo<PackCase>>);

TEST(CpuPackKvConversion, RoundsEveryKindOfNumberLikeTheReference) {
  std::vector<float> k = {0.0f,      -0.0f,    1.0f,        1.00390625f, 1.01171875f,
                          65504.0f,  65519.0f, 65520.0f,    -1e9f,       6.1035156e-5f,
                          6.097e-5f, 5.96e-8f, 2.98e-8f,    2.99e-8f,    1e-30f,
                          3.4e38f,   1e-40f,   0.33333334f, -0.1f,       1024.5f};
  k.push_back(std::numeric_limits<float>::infinity());
  k.push_back(-std::numeric_limits<float>::infinity());
  k.push_back(std::numeric_limits<float>::quiet_NaN());
  k.push_back(std::bit_cast<float>(0x7fffffffu));
  k.push_back(std::bit_cast<float>(0xff800001u));
  std::mt19937 random(1);
  while (k.size() < 1 << 16) {
    const uint32_t bits = random();
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    if (x == x) k.push_back(x);
  }
  PackKvParams p;
  p.k = p.v = k.data();
  p.head_dim = 16;
  p.num_tokens = static_cast<int64_t>(k.size()) / p.head_dim;
  p.kv_head_stride = static_cast<int64_t>(k.size());
  p.num_blocks = p.num_tokens / 16;
  p.num_heads = 1;
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    p.dst_dtype = dtype;
    const std::vector<char> actual = Pack(cpu::PackKv, p);
    const std::vector<char> expected = Pack(reference::PackKv, p);
    for (size_t i = 0; i < k.size(); ++i) {
      uint16_t a, e;
      std::memcpy(&a, &actual[2 * i], 2);
      std::memcpy(&e, &expected[2 * i], 2);
      ASSERT_EQ(a, e) << Name(dtype) << " of " << k[i];
    }
  }
}

// One token of one head, and what became of it.
struct Vector {
  float scale;
  std::vector<uint8_t> elements;
};

Vector PackVector(const std::vector<float>& k) {
  PackKvParams p;
  p.k = p.v = k.data();
  p.head_dim = static_cast<int>(k.size());
  p.num_tokens = p.num_blocks = p.num_heads = 1;
  p.kv_head_stride = p.head_dim;
  p.scales = KvScales::kPerToken;
  const std::vector<char> bytes = Pack(cpu::PackKv, p);
  EXPECT_EQ(bytes, Pack(reference::PackKv, p));
  Vector vector;
  std::memcpy(&vector.scale, &bytes[static_cast<size_t>(PackedElementBytes(p))], sizeof(float));
  vector.elements.assign(bytes.begin(), bytes.begin() + p.head_dim);
  return vector;
}

TEST(CpuPackKvScales, EveryNumberOfE4m3ComesBackAndTiesGoToEven) {
  // With a largest magnitude of 448 the scale is 1.
  std::vector<float> k = {448.0f, 0.0f, -0.0f, 447.0f, 432.0f, 431.9f, 416.0f, 17.0f, 19.0f};
  for (const float units : {0.5f, 0.50001f, 1.0f, 1.5f, 2.5f, 7.5f, 8.5f, -7.49f}) {
    k.push_back(units / 512.0f);  // around the subnormal numbers, multiples of 2^-9
  }
  k.resize(32, 1.0f);
  const Vector vector = PackVector(k);
  EXPECT_EQ(vector.scale, 1.0f);
  const std::vector<uint8_t> expected = {0x7e, 0x00, 0x80, 0x7e, 0x7e, 0x7d, 0x7d, 0x58, 0x5a,
                                         0x00, 0x01, 0x01, 0x02, 0x02, 0x08, 0x08, 0x87};
  EXPECT_EQ(std::vector<uint8_t>(vector.elements.begin(), vector.elements.begin() + 17), expected);
}

TEST(CpuPackKvScales, ZerosAndWhatIsNotFinite) {
  std::vector<float> k(32, 0.0f);
  EXPECT_EQ(PackVector(k).scale, 0.0f);
  EXPECT_EQ(PackVector(k).elements, std::vector<uint8_t>(32, 0));

  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  k = {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN(), 896.0f, -2.0f};
  k.resize(32, 0.0f);
  Vector vector = PackVector(k);
  EXPECT_EQ(vector.scale, 2.0f) << "that of the finite numbers";
  EXPECT_EQ(std::vector<uint8_t>(vector.elements.begin(), vector.elements.begin() + 5),
            std::vector<uint8_t>({0x7f, 0xff, 0x7f, 0x7e, 0xb8}));

  k.assign(32, kInfinity);
  vector = PackVector(k);
  EXPECT_EQ(vector.scale, 0.0f);
  EXPECT_EQ(vector.elements, std::vector<uint8_t>(32, 0x7f));

  k.assign(32, 1e-40f);  // so small that the scale's inverse would be infinite
  vector = PackVector(k);
  EXPECT_EQ(vector.scale, 0x1p-126f);
  EXPECT_EQ(vector.elements[0], 0x04) << "1e-40 / 2^-126 is 0.0085, 4.4 units of 2^-9";

  k.assign(32, std::numeric_limits<float>::max());
  EXPECT_EQ(PackVector(k).elements, std::vector<uint8_t>(32, 0x7e));
}

TEST(CpuPackKvScales, ErrorsAreWithinHalfAStep) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (int i = 0; i < 200; ++i) {
    std::vector<float> k(64);
    for (float& x : k) x = normal(random) * std::exp2(normal(random) * 8.0f);
    const Vector vector = PackVector(k);
    for (size_t j = 0; j < k.size(); ++j) {
      const int bits = vector.elements[j] & 0x7f, exponent = bits >> 3, mantissa = bits & 7;
      float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                  : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
      if ((vector.elements[j] & 0x80) != 0) value = -value;
      // Half a step is 2^-4 of a normal number and 2^-10 of the scale below those. The scale and
      // its inverse are rounded too, by 2^-23 together.
      const float bound = std::max(std::fabs(k[j]) * 0.0625f, vector.scale * 0x1p-10f) * 1.00001f;
      ASSERT_LE(std::fabs(value * vector.scale - k[j]), bound) << k[j] << " times " << vector.scale;
    }
  }
}

}  // namespace
}  // namespace prefilld::kernels::testing
