#include "kernels/cpu/ops.h"

#include <gtest/gtest.h>

#include <bit>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "tests/kernels/cases.h"
#include "tests/kernels/reference_layer_ops.h"

namespace prefilld::kernels::testing {
namespace {

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
  for (const KvOrder order : kPackOrders) {
    for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
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
      EXPECT_EQ(Pack(cpu::PackKv, p), Pack(reference::PackKv, p))
          << Name(dtype) << " in order " << static_cast<int>(order);
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

}  // namespace
}  // namespace prefilld::kernels::testing
