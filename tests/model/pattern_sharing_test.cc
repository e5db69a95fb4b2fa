#include "model/sparse/pattern_sharing.h"

#include <gtest/gtest.h>

#include <vector>

#include "tests/model/structured_layer.h"

namespace prefilld::model {
namespace {

TEST(PatternSharing, KeepsWhatVerticalSlashLosesWhereAttentionFollowsContent) {
  for (int64_t num_tokens : {4096, 4000}) {
    Layer layer(num_tokens, kAllTopics, kSameTopics);
    const auto dense = layer.AttendDense();
    LayerReport report;
    const auto shared = layer.Attend(Options(AttentionPolicy::kShare), &report);
    EXPECT_EQ(report.pivot_heads, 1);
    EXPECT_EQ(report.shared_heads, 3);
    EXPECT_GT(report.density, 0.25);
    EXPECT_LT(report.density, 0.25 + 0.75 * 0.2);
    EXPECT_EQ(HeadError(shared, dense, 0), 0.0) << "the pivot is exact";
    for (int head = 1; head < kNumHeads; ++head) EXPECT_LT(HeadError(shared, dense, head), 0.3);

    const auto vertical_slash = layer.Attend(Options(AttentionPolicy::kVerticalSlash), &report);
    EXPECT_EQ(report.vertical_slash_heads, kNumHeads);
    EXPECT_EQ(report.pivot_heads, 0);
    EXPECT_LT(report.density, 0.5);
    for (int head = 0; head < kNumHeads; ++head) {
      EXPECT_GT(HeadError(vertical_slash, dense, head), 0.5);
    }
  }
}

TEST(PatternSharing, AMemberThatLooksElsewhereIsScored) {
  Layer layer(4096, kAllTopics, {1, 1, 2, 1});
  LayerReport report;
  layer.Attend(Options(AttentionPolicy::kShare), &report);
  EXPECT_EQ(report.pivot_heads, 1);
  EXPECT_EQ(report.shared_heads, 2);
  EXPECT_EQ(report.scored_heads, 1);
}

TEST(PatternSharing, VerticalSlashHasAGammaOfItsOwn) {
  Layer layer(4096, kAllTopics, kSameTopics);
  AttentionOptions options = Options(AttentionPolicy::kVerticalSlash);
  options.min_budget_tokens = 0;
  LayerReport plain, own;
  options.gamma = 0.3f;
  const auto low = layer.Attend(options, &plain);
  options.gamma = 0.9f;
  layer.Attend(options, &own);
  EXPECT_GT(own.density, plain.density);
  options.vertical_slash_gamma = 0.3f;
  EXPECT_EQ(layer.Attend(options, &own), low);
  EXPECT_EQ(own.density, plain.density);

  // Patterns of pivots are still cut at gamma.
  options = Options(AttentionPolicy::kShare);
  const auto shared = layer.Attend(options, &plain);
  options.vertical_slash_gamma = 0.3f;
  EXPECT_EQ(layer.Attend(options, &own), shared);
  EXPECT_EQ(own.shared_heads, 3);
  options.gamma = 0.3f;
  layer.Attend(options, &own);
  EXPECT_LT(own.density, plain.density);
}

// At gamma 1 the pattern holds every block and so does vertical-slash, which then follows each
// head by itself at no greater cost.
TEST(PatternSharing, AClusterThatVerticalSlashCoversAtEqualCostDoesNotShare) {
  Layer layer(4096, std::vector<Structure>(kNumHeads, Structure::kSinkAndLocal), kSameTopics);
  AttentionOptions options = Options(AttentionPolicy::kShare);
  options.gamma = 1.0f;
  const auto dense = layer.AttendDense();
  LayerReport report;
  const auto out = layer.Attend(options, &report);
  EXPECT_EQ(report.pivot_heads, 1);
  EXPECT_EQ(report.scored_heads, 3);
  for (int head = 0; head < kNumHeads; ++head) EXPECT_LT(HeadError(out, dense, head), 0.3);

  options.coverage = 1.0f;
  layer.Attend(options, &report);
  EXPECT_EQ(report.shared_heads, 3);
}

TEST(PatternSharing, ALayerWhoseClustersGainNothingIsAsWithoutClustersBitForBit) {
  Layer layer(4096, std::vector<Structure>(kNumHeads, Structure::kSinkAndLocal), kSameTopics);
  AttentionOptions options = Options(AttentionPolicy::kShare);
  options.gamma = 1.0f;
  LayerReport report;
  const auto out = layer.Attend(options, &report, /*num_layers=*/2);
  EXPECT_EQ(report.pivot_heads, 0);
  EXPECT_EQ(report.shared_heads, 0);
  EXPECT_EQ(report.scored_heads, kNumHeads);
  layer.RemoveClusters();
  LayerReport scored;
  EXPECT_EQ(layer.Attend(options, &scored), out);
  EXPECT_EQ(scored.density, report.density);
}

// A large budget floor makes vertical-slash cover everything, at the cost of all blocks.
TEST(PatternSharing, AClusterThatVerticalSlashCoversOnlyAtGreaterCostShares) {
  Layer layer(4096, kAllTopics, kSameTopics);
  AttentionOptions options = Options(AttentionPolicy::kShare);
  options.min_budget_tokens = 4096;
  LayerReport report;
  layer.Attend(options, &report);
  EXPECT_EQ(report.shared_heads, 3);
}

TEST(PatternSharing, SharedHeadsSeeWhatTheirOwnLastQueriesLookFor) {
  Layer layer(4096, kAllTopics, {1, 2, 1, 1});
  AttentionOptions options = Options(AttentionPolicy::kShare);
  options.tau = 1.0f;  // head 1 shares though it looks elsewhere
  const auto dense = layer.AttendDense();
  LayerReport report;
  const auto out = layer.Attend(options, &report);
  ASSERT_EQ(report.shared_heads, 3);
  EXPECT_GT(HeadError(out, dense, 1), 0.5);
  const std::ptrdiff_t last_block = kBlockTokens * kNumHeads * kHeadDim;
  EXPECT_LT(
      HeadError({out.end() - last_block, out.end()}, {dense.end() - last_block, dense.end()}, 1),
      0.3);
}

TEST(PatternSharing, WithoutSameLayerSharingItBeginsOneLayerLater) {
  Layer layer(4096, kAllTopics, kSameTopics);
  AttentionOptions options = Options(AttentionPolicy::kShare);
  options.same_layer_sharing = false;
  LayerReport report;
  layer.Attend(options, &report, /*num_layers=*/1);
  EXPECT_EQ(report.pivot_heads, 1);
  EXPECT_EQ(report.scored_heads, 3);
  layer.Attend(options, &report, /*num_layers=*/2);
  EXPECT_EQ(report.pivot_heads, 0);
  EXPECT_EQ(report.shared_heads, 4);
}

TEST(PatternSharing, HeadsOutsideSharedClustersAreScored) {
  Layer layer(4096, kAllTopics, kSameTopics);
  layer.clusters().cluster_of[0] = {HeadClusters::kNoCluster, 0, HeadClusters::kNoCluster, 0};
  LayerReport report;
  layer.Attend(Options(AttentionPolicy::kShare), &report);
  EXPECT_EQ(report.pivot_heads, 1);
  EXPECT_EQ(report.shared_heads, 1);
  EXPECT_EQ(report.scored_heads, 2);
}

TEST(PatternSharing, ThresholdsThatForceEveryBlockGiveDenseBitForBit) {
  Layer layer(1000, kAllTopics, kSameTopics);
  const auto dense = layer.AttendDense();
  LayerReport report;
  AttentionOptions whole = Options(AttentionPolicy::kVerticalSlash);
  whole.min_budget_tokens = 1000;
  EXPECT_EQ(layer.Attend(whole, &report), dense);
  EXPECT_EQ(report.density, 1.0);
}

TEST(PatternSharing, EveryHeadAloneInAClusterIsItsPivotAndDenseBitForBit) {
  Layer layer(1000, kAllTopics, kSameTopics);
  layer.clusters().num_clusters = kNumHeads;
  layer.clusters().cluster_of[0] = {0, 1, 2, 3};
  const auto dense = layer.AttendDense();
  LayerReport report;
  EXPECT_EQ(layer.Attend(Options(AttentionPolicy::kShare), &report), dense);
  EXPECT_EQ(report.pivot_heads, kNumHeads);
  EXPECT_EQ(report.density, 1.0);
}

TEST(PatternSharing, WhereNoPivotFormsItIsAsWithoutClustersBitForBit) {
  Layer layer(2000, kAllTopics, kSameTopics);
  LayerReport plain, share;
  AttentionOptions sparse_excluded = Options(AttentionPolicy::kShare);
  sparse_excluded.delta = 0.0f;
  const auto excluded = layer.Attend(sparse_excluded, &share);
  AttentionOptions never = Options(AttentionPolicy::kShare);
  never.coverage = 0.0f;
  const auto not_covered = layer.Attend(never, &share);
  EXPECT_EQ(share.scored_heads, kNumHeads);
  layer.RemoveClusters();
  const auto expected = layer.Attend(Options(AttentionPolicy::kShare), &plain);
  EXPECT_EQ(excluded, expected);
  EXPECT_EQ(not_covered, expected);
  EXPECT_EQ(share.density, plain.density);
}

// A pivot beside scored heads changes nothing for them.
TEST(PatternSharing, WithTauZeroItIsScoredHeadsPlusPivots) {
  Layer layer(2000, kAllTopics, kSameTopics);
  LayerReport report;
  const auto dense = layer.AttendDense();
  AttentionOptions options = Options(AttentionPolicy::kShare);
  options.tau = 0.0f;
  const auto out = layer.Attend(options, &report);
  EXPECT_EQ(report.pivot_heads, 1);
  EXPECT_EQ(HeadError(out, dense, 0), 0.0);
  layer.RemoveClusters();
  const auto scored = layer.Attend(options, &report);
  for (int head = 1; head < kNumHeads; ++head) EXPECT_EQ(HeadError(out, scored, head), 0.0);
}

TEST(PatternSharing, APromptInheritsNothingFromTheOneBefore) {
  ModelConfig config;
  config.num_layers = 1;
  config.num_heads = config.num_kv_heads = 1;
  config.head_dim = kHeadDim;
  HeadClusters clusters;
  clusters.num_clusters = 1;
  clusters.cluster_of = {{0}};
  const auto device = *CreateDevice(DeviceChoice::kCpu, 1);
  const auto workspace = *SharingWorkspace::Create(device.get(), &config, &clusters, 512, 64);
  const auto sharing = *PatternSharing::Create(workspace.get(), 512);
  for (int64_t num_tokens : {512, 300, 512}) {
    std::vector<float> zeros(num_tokens * kHeadDim, 0.0f), out(zeros);
    kernels::AttentionParams params = {.q = zeros.data(),
                                       .k = zeros.data(),
                                       .v = zeros.data(),
                                       .out = out.data(),
                                       .num_queries = num_tokens,
                                       .num_keys = num_tokens,
                                       .kv_head_stride = num_tokens * kHeadDim,
                                       .num_heads = 1,
                                       .num_kv_heads = 1,
                                       .head_dim = kHeadDim,
                                       .block_tokens = 64,
                                       .scale = 1.0f};
    sharing->StartPrompt(num_tokens, Options(AttentionPolicy::kShare));
    LayerReport report;
    ASSERT_TRUE(sharing->Attend(0, params, &report).ok());
    ASSERT_TRUE(sharing->Report(&report).ok());
    EXPECT_EQ(report.pivot_heads, 1) << num_tokens;
  }
}

}  // namespace
}  // namespace prefilld::model
