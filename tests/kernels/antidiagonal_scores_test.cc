#include "kernels/cpu/ops.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "tests/kernels/cases.h"
#include "tests/kernels/closeness.h"
#include "tests/kernels/reference_pattern.h"
#include "tests/kernels/structured_qkv.h"

namespace prefilld::kernels::testing {
namespace {

struct ScoresData {
  explicit ScoresData(const AntidiagonalCase& c)
      : qkv(MakeQkv(c.num_queries, c.num_keys, c.num_heads, c.num_kv_heads, c.head_dim, 5)),
        heads(static_cast<size_t>(c.num_heads)) {
    std::iota(heads.begin(), heads.end(), 0);
    params.q = qkv.q.data();
    params.k = qkv.k.data();
    params.num_queries = c.num_queries;
    params.num_keys = c.num_keys;
    params.kv_head_stride = c.num_keys * c.head_dim;
    params.num_heads = c.num_heads;
    params.num_kv_heads = c.num_kv_heads;
    params.head_dim = c.head_dim;
    params.block_tokens = c.block_tokens;
    params.stride = c.stride;
    params.scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
    params.heads = heads.data();
    params.num_scored = c.num_heads;
  }

  // Returns what the op writes; entries that it does not write are zero.
  std::vector<float> Run(void (*op)(const AntidiagonalScoresParams&)) {
    const AntidiagonalFolds folds(params);
    std::vector<float> mass(
        static_cast<size_t>(params.num_scored * folds.num_query_blocks * folds.num_key_blocks));
    params.block_mass = mass.data();
    op(params);
    return mass;
  }

  Qkv qkv;
  std::vector<int> heads;
  AntidiagonalScoresParams params;
};

void ExpectClose(const std::vector<float>& actual, const std::vector<float>& expected) {
  const Closeness c = Compare(actual.data(), expected.data(), actual.size());
  EXPECT_EQ(c.wrong_non_finite, 0u);
  EXPECT_LT(c.relative, 1e-5) << c;
}

class CpuAntidiagonalScores : public ::testing::TestWithParam<AntidiagonalCase> {};

TEST_P(CpuAntidiagonalScores, EqualsReference) {
  ScoresData data(GetParam());
  ExpectClose(data.Run(cpu::AntidiagonalScores), data.Run(reference::AntidiagonalScores));
}

TEST_P(CpuAntidiagonalScores, EveryRowSumsToOneAndEndsAtItsDiagonal) {
  ScoresData data(GetParam());
  const std::vector<float> mass = data.Run(cpu::AntidiagonalScores);
  const AntidiagonalFolds folds(data.params);
  for (int64_t row = 0; row < data.params.num_scored * folds.num_query_blocks; ++row) {
    const float* begin = mass.data() + row * folds.num_key_blocks;
    const int64_t diagonal = folds.first_query_block + row % folds.num_query_blocks;
    EXPECT_NEAR(std::accumulate(begin, begin + diagonal + 1, 0.0), 1.0, 1e-5);
    for (int64_t c = diagonal + 1; c < folds.num_key_blocks; ++c) EXPECT_EQ(begin[c], 0.0f);
  }
}

INSTANTIATE_TEST_SUITE_P(Common, CpuAntidiagonalScores, ::testing::ValuesIn(AntidiagonalCases()),
                         CaseName<::testing::TestParamInfo<AntidiagonalCase>>);
INSTANTIATE_TEST_SUITE_P(OtherHeadDims, CpuAntidiagonalScores,
                         ::testing::Values(AntidiagonalCase{"HeadDim16", 700, 700, 4, 2, 16, 64, 8},
                                           AntidiagonalCase{"HeadDim80", 333, 333, 2, 1, 80, 128,
                                                            16}),
                         CaseName<::testing::TestParamInfo<AntidiagonalCase>>);

constexpr AntidiagonalCase kPlain = {"", 1000, 1000, 6, 2, 64, 128, 8};

// There is room behind each head's keys, as in a prefill, and what lies there counts for nothing.
TEST(CpuAntidiagonal, NothingBehindTheLastKeyIsRead) {
  ScoresData data(kPlain);
  const std::vector<float> expected = data.Run(cpu::AntidiagonalScores);
  constexpr int64_t kPadding = 24;
  std::vector<float> padded;
  const int64_t length = kPlain.num_keys * kPlain.head_dim;
  for (int head = 0; head < kPlain.num_kv_heads; ++head) {
    padded.insert(padded.end(), data.qkv.k.begin() + head * length,
                  data.qkv.k.begin() + (head + 1) * length);
    padded.insert(padded.end(), kPadding * kPlain.head_dim,
                  std::numeric_limits<float>::quiet_NaN());
  }
  data.params.k = padded.data();
  data.params.kv_head_stride = length + kPadding * kPlain.head_dim;
  EXPECT_EQ(data.Run(cpu::AntidiagonalScores), expected);
}

TEST(CpuAntidiagonal, ScoresTheHeadsThatAreAskedFor) {
  ScoresData data(kPlain);
  const std::vector<float> all = data.Run(cpu::AntidiagonalScores);
  const size_t of_head = all.size() / kPlain.num_heads;
  const int wanted[] = {4, 1};
  data.params.heads = wanted;
  data.params.num_scored = 2;
  std::vector<float> expected(all.begin() + 4 * of_head, all.begin() + 5 * of_head);
  expected.insert(expected.end(), all.begin() + of_head, all.begin() + 2 * of_head);
  EXPECT_EQ(data.Run(cpu::AntidiagonalScores), expected);
}

// The queries of a suffix see the same keys, so their rows are those of the whole prompt, but for
// the row of the block in which the suffix begins.
TEST(CpuAntidiagonal, ASuffixHasTheRowsOfTheWhole) {
  ScoresData whole(kPlain);
  const std::vector<float> expected = whole.Run(cpu::AntidiagonalScores);
  constexpr int64_t kFirst = 3 * 128;  // a block's beginning
  ScoresData suffix(kPlain);
  suffix.params.q = suffix.qkv.q.data() + kFirst * kPlain.num_heads * kPlain.head_dim;
  suffix.params.num_queries = kPlain.num_queries - kFirst;
  const std::vector<float> actual = suffix.Run(cpu::AntidiagonalScores);
  const AntidiagonalFolds folds(suffix.params);
  const int64_t of_head = folds.num_query_blocks * folds.num_key_blocks;
  for (int head = 0; head < kPlain.num_heads; ++head) {
    const std::vector<float> a(actual.begin() + head * of_head,
                               actual.begin() + (head + 1) * of_head);
    const auto end = expected.begin() + (head + 1) * folds.num_key_blocks * folds.num_key_blocks;
    ExpectClose(a, std::vector<float>(end - of_head, end));
  }
}

// A single token of a last fold has no antidiagonal partner in its own fold. Where all true scores
// are negative, the zeros of the padding would win all mass if they counted.
TEST(CpuAntidiagonal, PaddingWinsNoMass) {
  AntidiagonalCase c = {"", 1025, 1025, 1, 1, 64, 128, 8};
  ScoresData data(c);
  std::fill(data.qkv.q.begin(), data.qkv.q.end(), 4.0f);
  std::fill(data.qkv.k.begin(), data.qkv.k.end(), -4.0f);
  const std::vector<float> mass = data.Run(cpu::AntidiagonalScores);
  const float* last_row = mass.data() + mass.size() - 9;
  EXPECT_EQ(last_row[8], 0.0f);
  for (int block = 0; block < 8; ++block) EXPECT_NEAR(last_row[block], 0.125f, 1e-6f);
}

// This is what the scores are for: blocks chosen by them hold most of the true mass of heads that
// follow their own position, which the last queries alone describe as well, and of heads that
// follow a topic, which they do not.
TEST(CpuAntidiagonal, FindsTheBlocksOfATopic) {
  constexpr int kTopicHead = 3;
  constexpr int64_t kTokens = 4096, kBlock = 128, kBlocks = kTokens / kBlock;
  // Every 512 tokens one block of keys shares a direction with the queries of its own kind alone.
  std::vector<float> q(kTokens * 64), k(kTokens * 64);
  for (int64_t t = 0; t < kTokens; ++t) {
    const int64_t kind = t / kBlock % 4;
    for (int64_t i = 0; i < 16; ++i) q[t * 64 + kind * 16 + i] = k[t * 64 + kind * 16 + i] = 3.0f;
  }
  const int head = 0;
  std::vector<float> mass(kBlocks * kBlocks);
  cpu::AntidiagonalScores({.q = q.data(),
                           .k = k.data(),
                           .num_queries = kTokens,
                           .num_keys = kTokens,
                           .kv_head_stride = kTokens * 64,
                           .num_heads = 1,
                           .num_kv_heads = 1,
                           .head_dim = 64,
                           .block_tokens = kBlock,
                           .stride = 8,
                           .scale = 0.125f,
                           .heads = &head,
                           .num_scored = 1,
                           .block_mass = mass.data()});
  std::vector<uint32_t> pattern(kBlocks);
  cpu::SelectRows({.block_mass = mass.data(),
                   .num_query_blocks = kBlocks,
                   .num_key_blocks = kBlocks,
                   .gamma = 0.95f,
                   .pattern = pattern.data()});
  for (int64_t row = kTopicHead; row < kBlocks; ++row) {
    uint32_t expected = 1u;  // block 0 by rule
    for (int64_t c = row % 4; c <= row; c += 4) expected |= 1u << c;
    EXPECT_EQ(pattern[static_cast<size_t>(row)], expected) << "row " << row;
  }
}

}  // namespace
}  // namespace prefilld::kernels::testing
