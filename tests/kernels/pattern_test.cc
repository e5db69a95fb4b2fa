#include "kernels/cpu/ops.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <random>
#include <vector>

#include "kernels/attention.h"
#include "tests/kernels/cases.h"
#include "tests/kernels/closeness.h"
#include "tests/kernels/reference_pattern.h"
#include "tests/kernels/structured_qkv.h"

namespace prefilld::kernels::testing {
namespace {

struct EstimateData {
  explicit EstimateData(const EstimateCase& c)
      : num_queries(std::min<int64_t>(c.block_tokens, c.num_keys)),
        qkv(MakeQkv(num_queries, c.num_keys, c.num_heads, c.num_kv_heads, c.head_dim, 2)),
        block_mass(static_cast<size_t>(c.num_heads * CeilDiv(c.num_keys, c.block_tokens)), -1.0f),
        vertical(static_cast<size_t>(c.num_heads * c.num_keys), -1.0f),
        slash(vertical.size(), -1.0f),
        scratch(
            static_cast<size_t>(EstimateScratchBytes(c.num_heads, c.num_keys, c.block_tokens))) {
    params.q = qkv.q.data();
    params.k = qkv.k.data();
    params.num_queries = num_queries;
    params.num_keys = c.num_keys;
    params.kv_head_stride = c.num_keys * c.head_dim;
    params.num_heads = c.num_heads;
    params.num_kv_heads = c.num_kv_heads;
    params.head_dim = c.head_dim;
    params.block_tokens = c.block_tokens;
    params.scale = 0.125f;
    params.block_mass = block_mass.data();
    params.vertical = vertical.data();
    params.slash = slash.data();
    params.scratch = scratch.data();
  }

  int64_t num_queries;
  Qkv qkv;
  std::vector<float> block_mass, vertical, slash;
  std::vector<char> scratch;
  EstimateParams params;
};

class CpuEstimate : public ::testing::TestWithParam<EstimateCase> {};

TEST_P(CpuEstimate, EqualsReference) {
  EstimateData actual(GetParam());
  EstimateData expected(GetParam());
  cpu::Estimate(actual.params);
  reference::Estimate(expected.params);
  const auto expect_close = [](const std::vector<float>& a, const std::vector<float>& e) {
    const Closeness c = Compare(a.data(), e.data(), a.size());
    EXPECT_EQ(c.wrong_non_finite, 0u);
    EXPECT_LT(c.relative, 1e-5) << c;
  };
  expect_close(actual.block_mass, expected.block_mass);
  expect_close(actual.vertical, expected.vertical);
  expect_close(actual.slash, expected.slash);
}

INSTANTIATE_TEST_SUITE_P(Common, CpuEstimate, ::testing::ValuesIn(EstimateCases()),
                         CaseName<::testing::TestParamInfo<EstimateCase>>);

// Makes masses of `num_heads` rows that sum to 1: a few large ones and many small ones. With `ties`
// they have few distinct values.
std::vector<float> MakeMasses(int num_heads, int64_t n, bool ties, uint32_t seed) {
  std::mt19937 random(seed);
  std::exponential_distribution<float> exponential;
  std::uniform_int_distribution<int> level(0, 3);
  std::vector<float> mass(static_cast<size_t>(num_heads * n));
  for (int h = 0; h < num_heads; ++h) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
      const float x = exponential(random);
      float& m = mass[static_cast<size_t>(h * n + i)];
      m = ties ? static_cast<float>(level(random)) : x * x * x * x;
      sum += m;
    }
    for (int64_t i = 0; sum > 0.0f && i < n; ++i) mass[static_cast<size_t>(h * n + i)] /= sum;
  }
  return mass;
}

struct Selection {
  std::vector<uint32_t> columns, diagonals;
  bool operator==(const Selection&) const = default;
};

Selection RunVerticalSlash(void (*op)(const VerticalSlashParams&), VerticalSlashParams p) {
  const int64_t words = PatternWords(CeilDiv(p.num_keys, p.block_tokens));
  Selection s{std::vector<uint32_t>(static_cast<size_t>(p.num_heads * words), ~0u),
              std::vector<uint32_t>(static_cast<size_t>(p.num_heads * words), ~0u)};
  p.columns = s.columns.data();
  p.diagonals = s.diagonals.data();
  op(p);
  return s;
}

TEST(CpuVerticalSlash, EqualsReferenceWithAndWithoutTies) {
  for (const int64_t num_keys : {1, 64, 65, 700, 5000, 9000}) {
    for (const bool ties : {false, true}) {
      for (const float gamma : {0.3f, 0.9f, 1.0f}) {
        for (const int64_t budget : {0, 100, 1000000}) {
          constexpr int kHeads = 3;
          const std::vector<float> vertical = MakeMasses(kHeads, num_keys, ties, 1);
          const std::vector<float> slash = MakeMasses(kHeads, num_keys, ties, 2);
          VerticalSlashParams p;
          p.vertical = vertical.data();
          p.slash = slash.data();
          p.num_keys = num_keys;
          p.num_heads = kHeads;
          p.block_tokens = 64;
          p.gamma = gamma;
          p.min_budget_tokens = budget;
          EXPECT_EQ(RunVerticalSlash(cpu::VerticalSlash, p),
                    RunVerticalSlash(reference::VerticalSlash, p))
              << num_keys << " keys, ties " << ties << ", gamma " << gamma << ", budget " << budget;
        }
      }
    }
  }
}

TEST(CpuVerticalSlash, TakesBothBlockDiagonalsThatADiagonalCrosses) {
  std::vector<float> vertical(256), slash(256);
  vertical[200] = 1.0f;
  slash[64] = 0.6f;
  slash[130] = 0.4f;
  VerticalSlashParams p;
  p.vertical = vertical.data();
  p.slash = slash.data();
  p.num_keys = 256;
  p.num_heads = 1;
  p.block_tokens = 64;
  const Selection s = RunVerticalSlash(cpu::VerticalSlash, p);
  EXPECT_EQ(s.columns[0], 0b1001u);    // column 0 by rule, 200 / 64 = 3
  EXPECT_EQ(s.diagonals[0], 0b1111u);  // 0 by rule, 64 exactly one, 130 crosses 2 and 3
}

TEST(CpuVerticalSlash, AmongEqualMassesTheLowestIndexWins) {
  std::vector<float> mass(4096, 1.0f / 4096);
  VerticalSlashParams p;
  p.vertical = mass.data();
  p.slash = mass.data();
  p.num_keys = 4096;
  p.num_heads = 1;
  p.block_tokens = 128;
  p.gamma = 0.5f;
  const Selection s = RunVerticalSlash(cpu::VerticalSlash, p);
  EXPECT_EQ(s.columns[0], 0x0000ffffu);
  EXPECT_EQ(s.diagonals[0], 0x0001ffffu);  // the last offset chosen, 2047, crosses block 16
}

TEST(CpuExpandVerticalSlash, EqualsReference) {
  for (const int64_t key_blocks : {1, 2, 31, 32, 33, 64, 100}) {
    for (const int64_t query_blocks : {int64_t{1}, key_blocks / 2 + 1, key_blocks}) {
      // Rows of a random pattern serve as random bits.
      const std::vector<uint32_t> columns = MakePattern(1, key_blocks, 0.1, 1);
      const std::vector<uint32_t> diagonals = MakePattern(1, key_blocks, 0.1, 2);
      std::vector<uint32_t> actual(static_cast<size_t>(query_blocks * PatternWords(key_blocks)),
                                   ~0u);
      std::vector<uint32_t> expected = actual;
      ExpandVerticalSlashParams p{columns.data(), diagonals.data(), query_blocks, key_blocks,
                                  actual.data()};
      cpu::ExpandVerticalSlash(p);
      p.pattern = expected.data();
      reference::ExpandVerticalSlash(p);
      EXPECT_EQ(actual, expected) << query_blocks << " of " << key_blocks;
    }
  }
}

TEST(CpuExpandVerticalSlash, SeveralHeadsAreCounted) {
  constexpr int kHeads = 3;
  constexpr int64_t kBlocks = 70;
  const int64_t words = PatternWords(kBlocks);
  const std::vector<uint32_t> columns = MakePattern(kHeads, kBlocks, 0.1, 1);
  const std::vector<uint32_t> diagonals = MakePattern(kHeads, kBlocks, 0.1, 2);
  std::vector<uint32_t> actual(static_cast<size_t>(kHeads * kBlocks * words), ~0u);
  std::vector<int64_t> blocks(kHeads, -1);
  cpu::ExpandVerticalSlash({.columns = columns.data(),
                            .diagonals = diagonals.data(),
                            .num_query_blocks = kBlocks,
                            .num_key_blocks = kBlocks,
                            .pattern = actual.data(),
                            .num_heads = kHeads,
                            .blocks = blocks.data()});
  for (int head = 0; head < kHeads; ++head) {
    std::vector<uint32_t> expected(static_cast<size_t>(kBlocks * words));
    reference::ExpandVerticalSlash({.columns = &columns[head * words],
                                    .diagonals = &diagonals[head * words],
                                    .num_query_blocks = kBlocks,
                                    .num_key_blocks = kBlocks,
                                    .pattern = expected.data()});
    const auto first = actual.begin() + head * kBlocks * words;
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), first)) << head;
    int64_t bits = 0;
    for (const uint32_t word : expected) bits += std::popcount(word);
    EXPECT_EQ(blocks[head], bits);
  }
}

// Makes block mass as attention writes it: rows sum to 1, and nothing is above the diagonal.
std::vector<float> MakeBlockMass(int64_t query_blocks, int64_t key_blocks, bool ties) {
  std::vector<float> mass(static_cast<size_t>(query_blocks * key_blocks));
  for (int64_t row = 0; row < query_blocks; ++row) {
    const int64_t n = key_blocks - query_blocks + row + 1;
    const std::vector<float> values = MakeMasses(1, n, ties, static_cast<uint32_t>(row));
    std::copy(values.begin(), values.end(), mass.begin() + row * key_blocks);
  }
  return mass;
}

TEST(CpuSelectRows, EqualsReferenceWithAndWithoutTies) {
  for (const int64_t key_blocks : {1, 2, 32, 33, 70}) {
    for (const int64_t query_blocks : {int64_t{1}, key_blocks}) {
      for (const bool ties : {false, true}) {
        for (const float gamma : {0.1f, 0.9f, 1.0f}) {
          const std::vector<float> mass = MakeBlockMass(query_blocks, key_blocks, ties);
          std::vector<uint32_t> actual(static_cast<size_t>(query_blocks * PatternWords(key_blocks)),
                                       ~0u);
          std::vector<uint32_t> expected = actual;
          SelectRowsParams p{mass.data(), query_blocks, key_blocks, gamma, actual.data()};
          cpu::SelectRows(p);
          p.pattern = expected.data();
          reference::SelectRows(p);
          EXPECT_EQ(actual, expected)
              << query_blocks << " of " << key_blocks << ", ties " << ties << ", gamma " << gamma;
        }
      }
    }
  }
}

TEST(CpuSelectRows, TakesHeadsOneAfterTheOther) {
  constexpr int64_t kHeads = 3, kQueryBlocks = 5, kKeyBlocks = 70;
  const int64_t words = kQueryBlocks * PatternWords(kKeyBlocks);
  std::vector<float> mass;
  for (uint32_t head = 0; head < kHeads; ++head) {
    const std::vector<float> rows = MakeMasses(kQueryBlocks, kKeyBlocks, false, head);
    mass.insert(mass.end(), rows.begin(), rows.end());
  }
  std::vector<uint32_t> actual(static_cast<size_t>(kHeads * words)), expected = actual;
  cpu::SelectRows({mass.data(), kQueryBlocks, kKeyBlocks, 0.9f, actual.data(), kHeads});
  for (int head = 0; head < kHeads; ++head) {
    reference::SelectRows({mass.data() + head * kQueryBlocks * kKeyBlocks, kQueryBlocks, kKeyBlocks,
                           0.9f, expected.data() + head * words});
  }
  EXPECT_EQ(actual, expected);
}

TEST(CpuSelectRows, JoinsWhatThePatternHasAndCounts) {
  constexpr int64_t kHeads = 2, kBlocks = 40;
  const int64_t words = kBlocks * PatternWords(kBlocks);
  std::vector<float> mass;
  std::vector<uint32_t> actual;
  for (uint32_t head = 0; head < kHeads; ++head) {
    const std::vector<float> rows = MakeMasses(kBlocks, kBlocks, false, head);
    mass.insert(mass.end(), rows.begin(), rows.end());
    const std::vector<uint32_t> old = MakePattern(kBlocks, kBlocks, 0.1, head);
    actual.insert(actual.end(), old.begin(), old.end());
  }
  std::vector<uint32_t> expected(actual.size());
  std::vector<int64_t> expected_blocks(kHeads), blocks(kHeads, -1);
  for (int64_t head = 0; head < kHeads; ++head) {
    reference::SelectRows({mass.data() + head * kBlocks * kBlocks, kBlocks, kBlocks, 0.5f,
                           expected.data() + head * words});
    for (int64_t i = head * words; i < (head + 1) * words; ++i) {
      expected[static_cast<size_t>(i)] |= actual[static_cast<size_t>(i)];
      expected_blocks[static_cast<size_t>(head)] += std::popcount(expected[static_cast<size_t>(i)]);
    }
  }
  cpu::SelectRows({.block_mass = mass.data(),
                   .num_query_blocks = kBlocks,
                   .num_key_blocks = kBlocks,
                   .gamma = 0.5f,
                   .pattern = actual.data(),
                   .num_heads = kHeads,
                   .join = true,
                   .blocks = blocks.data()});
  EXPECT_EQ(actual, expected);
  EXPECT_EQ(blocks, expected_blocks);
}

TEST(CpuMeasurePattern, EqualsReference) {
  for (const int64_t key_blocks : {1, 33, 70}) {
    for (const int64_t query_blocks : {int64_t{1}, key_blocks}) {
      const std::vector<float> mass = MakeBlockMass(query_blocks, key_blocks, false);
      const std::vector<uint32_t> pattern = MakePattern(query_blocks, key_blocks, 0.2, 3);
      const std::vector<uint32_t> last_row = MakePattern(1, key_blocks, 0.2, 4);
      for (const uint32_t* last : {static_cast<const uint32_t*>(nullptr), last_row.data()}) {
        double actual_mass = -1.0, expected_mass = -1.0;
        int64_t actual_blocks = -1, expected_blocks = -1;
        MeasurePatternParams p{mass.data(), pattern.data(), last,          query_blocks,
                               key_blocks,  &actual_mass,   &actual_blocks};
        cpu::MeasurePattern(p);
        p.mass = &expected_mass;
        p.blocks = &expected_blocks;
        reference::MeasurePattern(p);
        EXPECT_NEAR(actual_mass, expected_mass, 1e-12);
        EXPECT_EQ(actual_blocks, expected_blocks);
        p.block_mass = nullptr;
        p.mass = nullptr;
        actual_blocks = -1;
        p.blocks = &actual_blocks;
        cpu::MeasurePattern(p);
        EXPECT_EQ(actual_blocks, expected_blocks);
      }
    }
  }
}

class CpuPooledMass : public ::testing::TestWithParam<EstimateCase> {};

TEST_P(CpuPooledMass, EqualsReferenceForEveryHead) {
  const EstimateCase& c = GetParam();
  const int64_t n = CeilDiv(c.num_keys, c.block_tokens);
  const Qkv data = MakeQkv(c.num_keys, c.num_keys, c.num_heads, c.num_kv_heads, c.head_dim, 3);
  std::vector<float> scratch(2 * n * c.head_dim), actual(n * n), expected(n * n);
  PooledMassParams p = {.q = data.q.data(),
                        .k = data.k.data(),
                        .num_tokens = c.num_keys,
                        .kv_head_stride = c.num_keys * c.head_dim,
                        .num_heads = c.num_heads,
                        .num_kv_heads = c.num_kv_heads,
                        .head_dim = c.head_dim,
                        .block_tokens = c.block_tokens,
                        .scale = 0.125f,
                        .scratch = scratch.data()};
  for (p.head = 0; p.head < c.num_heads; ++p.head) {
    p.block_mass = expected.data();
    reference::PooledMass(p);
    p.block_mass = actual.data();
    std::fill(actual.begin(), actual.end(), -1.0f);
    cpu::PooledMass(p);
    const Closeness closeness = Compare(actual.data(), expected.data(), actual.size());
    EXPECT_EQ(closeness.wrong_non_finite, 0u);
    EXPECT_LT(closeness.max_absolute, 1e-5) << "head " << p.head << ": " << closeness;
  }
}

INSTANTIATE_TEST_SUITE_P(Common, CpuPooledMass, ::testing::ValuesIn(EstimateCases()),
                         CaseName<::testing::TestParamInfo<EstimateCase>>);

}  // namespace

}  // namespace prefilld::kernels::testing
