#include "kernels/cpu/ops.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/attention_part.h"
#include "kernels/cpu/threads.h"
#include "tests/kernels/cases.h"
#include "tests/kernels/closeness.h"
#include "tests/kernels/reference_attention.h"
#include "tests/kernels/structured_qkv.h"

namespace prefilld::kernels::testing {
namespace {

// The sums of some thousand products are in fp32. The error measured is at most 3e-7.
constexpr double kRelativeTolerance = 3e-6;

class CpuAttention : public ::testing::TestWithParam<AttentionCase> {};

TEST_P(CpuAttention, EqualsReference) {
  AttentionData actual(GetParam());
  AttentionData expected(GetParam());
  cpu::Attention(actual.params);
  reference::Attention(expected.params);
  const Closeness out = Compare(actual.out.data(), expected.out.data(), actual.out.size());
  EXPECT_EQ(out.wrong_non_finite, 0u);
  EXPECT_LT(out.relative, kRelativeTolerance) << out;
  for (size_t h = 0; h < actual.block_mass.size(); ++h) {
    const std::vector<float>& mass = actual.block_mass[h];
    if (mass.empty()) continue;
    const Closeness c = Compare(mass.data(), expected.block_mass[h].data(), mass.size());
    EXPECT_EQ(c.wrong_non_finite, 0u);
    EXPECT_LT(c.max_absolute, 1e-5) << "head " << h;
    for (int64_t row = 0; row < actual.num_query_blocks; ++row) {
      double sum = 0.0;
      const int64_t diagonal = actual.num_key_blocks - actual.num_query_blocks + row;
      for (int64_t block = 0; block < actual.num_key_blocks; ++block) {
        const float m = mass[static_cast<size_t>(row * actual.num_key_blocks + block)];
        sum += m;
        EXPECT_TRUE(block <= diagonal || m == 0.0f) << row << ", " << block;
      }
      EXPECT_NEAR(sum, 1.0, 1e-5);
    }
  }
}

// The first part has one query block, and each later one two more than the one before.
TEST_P(CpuAttention, OfPartsGivesTheBitsOfTheWhole) {
  AttentionData whole(GetParam()), in_parts(GetParam());
  cpu::Attention(whole.params);
  std::vector<HeadWork> work(in_parts.work.size());
  int64_t end = 0;
  for (int64_t blocks = 1; end < in_parts.num_query_blocks; blocks += 2) {
    const int64_t first = end;
    end = std::min(first + blocks, in_parts.num_query_blocks);
    cpu::Attention(PartOf(in_parts.params, first, end, sizeof(float), work.data()));
  }
  EXPECT_EQ(in_parts.out, whole.out);
  EXPECT_EQ(in_parts.block_mass, whole.block_mass);
}

INSTANTIATE_TEST_SUITE_P(Common, CpuAttention, ::testing::ValuesIn(AttentionCases()),
                         CaseName<::testing::TestParamInfo<AttentionCase>>);
INSTANTIATE_TEST_SUITE_P(OtherHeadDims, CpuAttention, ::testing::ValuesIn(OtherHeadDimCases()),
                         CaseName<::testing::TestParamInfo<AttentionCase>>);

constexpr AttentionCase kSmall = {"Small", 200, 300, 4, 2, 64, 64, Blocks::kMixed};

TEST(CpuAttentionOp, LeavesHeadsWithoutWorkUntouched) {
  AttentionData data(kSmall);
  std::fill(data.out.begin(), data.out.end(), 7.0f);
  data.params.num_work = 2;  // heads 3 and 2
  cpu::Attention(data.params);
  for (size_t i = 0; i < data.out.size(); ++i) {
    ASSERT_EQ(data.out[i] == 7.0f, i / 64 % 4 < 2) << i;
  }
}

TEST(CpuAttentionOp, MayWriteOverItsQueries) {
  AttentionData apart(kSmall);
  AttentionData in_place(kSmall);
  cpu::Attention(apart.params);
  in_place.params.out = in_place.qkv.q.data();
  cpu::Attention(in_place.params);
  EXPECT_EQ(in_place.qkv.q, apart.out);
}

TEST(CpuAttentionOp, FullPatternGivesTheBitsOfDense) {
  AttentionCase c = {"", 400, 400, 2, 1, 64, 128, Blocks::kDense};
  AttentionData dense(c);
  c.blocks = Blocks::kFull;
  AttentionData full(c);
  c.blocks = Blocks::kDenseWithMass;
  AttentionData pivot(c);
  cpu::Attention(dense.params);
  cpu::Attention(full.params);
  cpu::Attention(pivot.params);
  EXPECT_EQ(dense.out, full.out);
  EXPECT_EQ(dense.out, pivot.out);
}

TEST(CpuAttentionOp, DoesNotDependOnTheNumberOfThreads) {
  AttentionData one(kSmall);
  AttentionData three(kSmall);
  cpu::UseThreads(1);
  cpu::Attention(one.params);
  cpu::UseThreads(3);
  cpu::Attention(three.params);
  cpu::UseThreads(cpu::AvailableThreads());
  EXPECT_EQ(one.out, three.out);
  EXPECT_EQ(one.block_mass, three.block_mass);
}

TEST(CpuAttentionOp, SurvivesLogitsFarApart) {
  AttentionData actual(kSmall);
  AttentionData expected(kSmall);
  actual.params.scale = expected.params.scale = 40.0f;
  cpu::Attention(actual.params);
  reference::Attention(expected.params);
  const Closeness c = Compare(actual.out.data(), expected.out.data(), actual.out.size());
  EXPECT_EQ(c.wrong_non_finite, 0u);
  // The logits are some thousands, so their rounding in fp32 decides the error.
  EXPECT_LT(c.relative, 1e-3) << c;
}

TEST(CpuAttentionOp, NotANumberInAKeyReachesTheRowsThatSeeIt) {
  AttentionCase c = {"", 150, 150, 1, 1, 64, 64, Blocks::kDense};
  AttentionData data(c);
  data.qkv.k[100 * 64 + 3] = std::numeric_limits<float>::quiet_NaN();
  cpu::Attention(data.params);
  for (size_t t = 0; t < 150; ++t) {
    EXPECT_EQ(std::isnan(data.out[t * 64]), t >= 100) << "row " << t;
  }
}

class CpuPagedAttention : public ::testing::TestWithParam<PagedCase> {};

TEST_P(CpuPagedAttention, EqualsReferenceInBothOrders) {
  const PagedCase& c = GetParam();
  const Qkv data = MakeQkv(1, c.num_keys, c.num_heads, c.num_kv_heads, c.head_dim, 3);
  const int64_t blocks = CeilDiv(c.num_keys, c.block_tokens);
  // The sequence's blocks lie scattered in a pool whose other blocks are full of NaN.
  std::vector<int32_t> table(static_cast<size_t>(blocks));
  for (int64_t b = 0; b < blocks; ++b) table[static_cast<size_t>(b)] = static_cast<int32_t>(2 * b);
  std::shuffle(table.begin(), table.end(), std::mt19937(5));
  for (const bool nhd : {true, false}) {
    PagedAttentionParams p;
    p.q = data.q.data();
    p.block_table = table.data();
    p.num_keys = c.num_keys;
    p.block_stride = int64_t{c.block_tokens} * c.num_kv_heads * c.head_dim;
    p.token_stride = nhd ? c.num_kv_heads * c.head_dim : c.head_dim;
    p.head_stride = nhd ? c.head_dim : c.block_tokens * c.head_dim;
    p.num_heads = c.num_heads;
    p.num_kv_heads = c.num_kv_heads;
    p.head_dim = c.head_dim;
    p.block_tokens = c.block_tokens;
    p.scale = 0.125f;
    std::vector<float> pools[2];
    for (int i = 0; i < 2; ++i) {
      pools[i].resize(static_cast<size_t>(2 * blocks * p.block_stride),
                      std::numeric_limits<float>::quiet_NaN());
      const float* from = i == 0 ? data.k.data() : data.v.data();
      for (int64_t h = 0; h < c.num_kv_heads; ++h) {
        for (int64_t t = 0; t < c.num_keys; ++t, from += c.head_dim) {
          const int64_t block = table[static_cast<size_t>(t / c.block_tokens)];
          std::copy_n(from, c.head_dim,
                      pools[i].begin() + block * p.block_stride + h * p.head_stride +
                          t % c.block_tokens * p.token_stride);
        }
      }
    }
    p.k_pool = pools[0].data();
    p.v_pool = pools[1].data();
    std::vector<float> scratch(
        static_cast<size_t>(PagedAttentionScratchFloats(c.num_heads, c.head_dim)));
    p.scratch = scratch.data();
    std::vector<float> actual(data.q.size()), expected(data.q.size());
    p.out = actual.data();
    cpu::PagedAttention(p);
    p.out = expected.data();
    reference::PagedAttention(p);
    const Closeness close = Compare(actual.data(), expected.data(), actual.size());
    EXPECT_EQ(close.wrong_non_finite, 0u);
    EXPECT_LT(close.relative, kRelativeTolerance) << close;
    // The output overwrites its own query, as the contract allows.
    std::vector<float> in_place = data.q;
    p.q = p.out = in_place.data();
    cpu::PagedAttention(p);
    EXPECT_EQ(in_place, actual);
  }
}

INSTANTIATE_TEST_SUITE_P(Common, CpuPagedAttention, ::testing::ValuesIn(PagedCases()),
                         CaseName<::testing::TestParamInfo<PagedCase>>);

}  // namespace
}  // namespace prefilld::kernels::testing
