#include "model/sparse/baseline_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <memory>
#include <vector>

#include "tests/model/one_layer.h"

namespace prefilld::model {
namespace {

bool Has(const std::vector<uint32_t>& pattern, int64_t num_blocks, int64_t row, int64_t block) {
  return pattern[row * kernels::PatternWords(num_blocks) + block / 32] >> (block % 32) & 1;
}

AttentionOptions Options(AttentionPolicy policy) {
  AttentionOptions options;
  options.policy = policy;
  options.tau = 1.0f;  // block means for every head
  options.min_budget_tokens = 1;
  return options;
}

struct BaselineRun {
  std::vector<float> out;
  LayerReport report;
};

BaselineRun Attend(OneLayer& layer, const AttentionOptions& options) {
  BaselineRun run;
  const auto workspace = BaselineWorkspace::Create(
      &layer.device(), &layer.config(), layer.num_tokens() + 100, OneLayer::kBlockTokens);
  EXPECT_TRUE(workspace.ok()) << workspace.status();
  BaselineAttention baseline(workspace->get());
  baseline.StartPrompt(layer.num_tokens(), options);
  EXPECT_TRUE(baseline.Attend(0, layer.Params(&run.out), &run.report).ok());
  return run;
}

// Tells whether a query's output holds anything of a block's values.
bool Computed(const BaselineRun& run, int64_t query, int head, int64_t block) {
  return run.out[(query * OneLayer::kNumHeads + head) * OneLayer::kHeadDim + block] > 0.0f;
}

TEST(RandomPattern, HasTheDensityAskedForWithBlockZeroAndTheDiagonal) {
  constexpr int64_t kBlocks = 200;
  constexpr double kCausal = kBlocks * (kBlocks + 1) / 2;
  std::vector<uint32_t> pattern(kBlocks * kernels::PatternWords(kBlocks));
  for (const float density : {0.1f, 0.25f, 0.6f, 1.0f}) {
    const int64_t count = RandomPattern(kBlocks, density, 3, absl::MakeSpan(pattern));
    EXPECT_NEAR(static_cast<double>(count) / kCausal, density, 0.01);
    int64_t bits = 0;
    for (const uint32_t word : pattern) bits += std::popcount(word);
    EXPECT_EQ(bits, count);
    for (int64_t row = 0; row < kBlocks; ++row) {
      EXPECT_TRUE(Has(pattern, kBlocks, row, 0));
      EXPECT_TRUE(Has(pattern, kBlocks, row, row));
      for (int64_t block = row + 1; block < kBlocks; ++block) {
        EXPECT_FALSE(Has(pattern, kBlocks, row, block));
      }
    }
  }
}

TEST(RandomPattern, SpreadsEvenlyAndFollowsItsSeed) {
  constexpr int64_t kBlocks = 128;
  std::vector<uint32_t> first(kBlocks * kernels::PatternWords(kBlocks)), second(first),
      again(first);
  RandomPattern(kBlocks, 0.3f, 1, absl::MakeSpan(first));
  RandomPattern(kBlocks, 0.3f, 2, absl::MakeSpan(second));
  RandomPattern(kBlocks, 0.3f, 1, absl::MakeSpan(again));
  EXPECT_EQ(first, again);
  EXPECT_NE(first, second);
  // Counts the blocks in each quarter of the last rows, without block 0 and the diagonal.
  std::vector<int> quarters(4);
  for (uint64_t seed = 0; seed < 50; ++seed) {
    RandomPattern(kBlocks, 0.3f, seed, absl::MakeSpan(first));
    for (int64_t block = 1; block < 125; ++block) {
      quarters[(block - 1) / 31] += Has(first, kBlocks, kBlocks - 1, block);
    }
  }
  for (const int quarter : quarters) EXPECT_NEAR(quarter, 50 * 0.3 * 31, 70) << "4 sigma";
}

TEST(BaselineAttention, RandomComputesTheDensityAskedFor) {
  OneLayer layer(3000);
  AttentionOptions options = Options(AttentionPolicy::kBaselineRandom);
  options.density = 0.3f;
  const BaselineRun run = Attend(layer, options);
  EXPECT_EQ(run.report.baseline_heads, OneLayer::kNumHeads);
  EXPECT_NEAR(run.report.density, 0.3, 0.02);
  EXPECT_NE(std::count_if(run.out.begin(), run.out.end(), [](float x) { return x > 0; }), 0);
}

TEST(BaselineAttention, QueryAwareFindsThePlantedBlock) {
  OneLayer layer(2048);
  // Queries of block r match the keys of block r / 2. All other logits are 0.
  std::fill(layer.q().begin(), layer.q().end(), 0.0f);
  std::fill(layer.k().begin(), layer.k().end(), 0.0f);
  const auto wanted = [](int64_t row) { return row / 2; };
  for (int64_t t = 0; t < layer.num_tokens(); ++t) {
    const int64_t block = t / OneLayer::kBlockTokens;
    for (int head = 0; head < OneLayer::kNumHeads; ++head) {
      layer.q()[(t * OneLayer::kNumHeads + head) * OneLayer::kHeadDim + wanted(block)] = 20.0f;
    }
    for (int kv_head = 0; kv_head < OneLayer::kNumKvHeads; ++kv_head) {
      layer.k()[(kv_head * layer.num_tokens() + t) * OneLayer::kHeadDim + block] = 10.0f;
    }
  }
  const BaselineRun run = Attend(layer, Options(AttentionPolicy::kBaselineQueryAware));
  EXPECT_EQ(run.report.baseline_heads, OneLayer::kNumHeads);
  for (int64_t query : {500, 1000, 1700, 2047}) {
    const int64_t row = query / OneLayer::kBlockTokens;
    for (int head = 0; head < OneLayer::kNumHeads; ++head) {
      for (int64_t block = 0; block <= row; ++block) {
        const bool expected = block == wanted(row) || block == 0 || block == row;
        EXPECT_EQ(Computed(run, query, head, block), expected)
            << "query " << query << ", head " << head << ", block " << block;
      }
    }
  }
  EXPECT_LT(run.report.density, 0.2);
}

TEST(BaselineAttention, HeadsThatBlockMeansDoNotPredictAreLeftToVerticalSlash) {
  OneLayer layer(2000);
  AttentionOptions options = Options(AttentionPolicy::kBaselineQueryAware);
  options.tau = 0.0f;
  BaselineRun run = Attend(layer, options);
  EXPECT_EQ(run.report.vertical_slash_heads, OneLayer::kNumHeads);
  EXPECT_EQ(run.report.baseline_heads, 0);
  options.tau = 0.1f;
  run = Attend(layer, options);
  EXPECT_EQ(run.report.vertical_slash_heads + run.report.baseline_heads, OneLayer::kNumHeads);
}

TEST(BaselineAttention, WhatIsLeftToVerticalSlashFollowsItsGamma) {
  OneLayer layer(3000);
  AttentionOptions options = Options(AttentionPolicy::kBaselineQueryAware);
  options.tau = 0.0f;
  options.min_budget_tokens = 0;
  options.gamma = 0.9f;
  const double common = Attend(layer, options).report.density;
  options.vertical_slash_gamma = 0.1f;
  EXPECT_LT(Attend(layer, options).report.density, 0.9 * common);
}

TEST(BaselineAttention, IsAuditedLikeTheOthers) {
  OneLayer layer(1200);
  for (const AttentionPolicy policy :
       {AttentionPolicy::kBaselineQueryAware, AttentionPolicy::kBaselineRandom}) {
    AttentionOptions options = Options(policy);
    options.gamma = 0.5f;
    options.recall_audit_rows = layer.num_blocks();
    const BaselineRun run = Attend(layer, options);
    const std::vector<double> expected = layer.RecallOf(run.out, layer.AllRows());
    ASSERT_EQ(run.report.recall.size(), size_t{OneLayer::kNumHeads});
    for (const HeadRecall& head : run.report.recall) {
      EXPECT_EQ(head.source, PatternSource::kBaseline);
      EXPECT_NEAR(head.recall, expected[head.head], 1e-4) << "head " << head.head;
    }
  }
}

}  // namespace
}  // namespace prefilld::model
