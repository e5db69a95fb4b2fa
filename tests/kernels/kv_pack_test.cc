#include "kernels/cpu/ops.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>
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
    for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
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
      p.k = kv[0].data();
      p.v = kv[1].data();
      const std::vector<char> expected = Pack(reference::PackKv, p);
      for (const DType from : {DType::kFp32, DType::kBf16}) {
        const bool is_bf16 = from == DType::kBf16;
        p.k = is_bf16 ? static_cast<const void*>(paged_bf16[0].data()) : paged[0].data();
        p.v = is_bf16 ? static_cast<const void*>(paged_bf16[1].data()) : paged[1].data();
        std::vector<char> bytes(static_cast<size_t>(PackedBytes(p)) + 8, 0x55);
        p.dst = bytes.data();
        cpu::PackPagedKv(p, {.pages = pages.data(), .page_tokens = kPageTokens, .dtype = from});
        EXPECT_EQ(bytes, expected)
            << Name(from) << " to " << Name(dtype) << " in order " << static_cast<int>(order);
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

}  // namespace
}  // namespace prefilld::kernels::testing
