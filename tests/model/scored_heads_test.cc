// Tests heads that choose blocks by scores of all their queries, and those that share such a
// choice.
#include <gtest/gtest.h>

#include <cstddef>
#include <vector>

#include "model/sparse/pattern_sharing.h"
#include "tests/model/structured_layer.h"

namespace prefilld::model {
namespace {

// Without clusters nothing is shared. Scores in which every query has a say find what the last
// queries cannot know: they see the topics of their own block alone.
TEST(ScoredHeads, WithoutClustersEveryHeadIsScoredAndFollowsContent) {
  for (const int64_t stride : {8, 16}) {
    Layer layer(4000, kAllTopics, {1, 2, 3, 4});
    layer.RemoveClusters();
    const auto dense = layer.AttendDense();
    AttentionOptions options = Options(AttentionPolicy::kShare);
    options.score_stride = stride;
    options.last_rows_gamma = 0.1f;
    options.min_budget_tokens = 0;
    LayerReport report;
    const auto out = layer.Attend(options, &report);
    EXPECT_EQ(report.scored_heads, kNumHeads);
    EXPECT_EQ(report.pivot_heads + report.shared_heads + report.vertical_slash_heads, 0);
    EXPECT_LT(report.density, 0.3);
    for (int head = 0; head < kNumHeads; ++head) EXPECT_LT(HeadError(out, dense, head), 0.3);

    options.score_threshold = 0.01f;
    const auto without_scores = layer.Attend(options, &report);
    for (int head = 0; head < kNumHeads; ++head) {
      EXPECT_GT(HeadError(without_scores, dense, head), 0.35);
    }
  }
}

// Averages hide a single key, which the last queries' columns show.
TEST(ScoredHeads, ScoredHeadsSeeTheSingleKeysThatTheirLastQueriesLookFor) {
  Layer layer(4000, std::vector<Structure>(kNumHeads, Structure::kNeedle), kSameTopics);
  layer.RemoveClusters();
  const auto dense = layer.AttendDense();
  AttentionOptions options = Options(AttentionPolicy::kShare);
  options.min_budget_tokens = 0;
  LayerReport report;
  const auto out = layer.Attend(options, &report);
  EXPECT_LT(report.density, 0.2);
  for (int head = 0; head < kNumHeads; ++head) EXPECT_LT(HeadError(out, dense, head), 0.3);
}

TEST(ScoredHeads, ScoredHeadsComputeMoreWhereTheirThresholdsAreHigher) {
  Layer layer(4096, kAllTopics, {1, 2, 3, 4});
  layer.RemoveClusters();
  AttentionOptions options = Options(AttentionPolicy::kShare);
  options.score_threshold = 0.5f;
  options.last_rows_gamma = 0.1f;
  options.min_budget_tokens = 0;
  LayerReport low, scores, last_rows;
  layer.Attend(options, &low);
  options.score_threshold = 0.95f;
  layer.Attend(options, &scores);
  EXPECT_GT(scores.density, low.density);
  options.score_threshold = 0.5f;
  options.last_rows_gamma = 0.9f;
  layer.Attend(options, &last_rows);
  EXPECT_GT(last_rows.density, low.density);
}

// The pivot of a cluster that shares scores is scored like a head without a cluster, and the others
// take its pattern for nothing.
TEST(ScoredHeads, HeadsOfAClusterThatSharesScoresTakeThePatternOfTheFirst) {
  for (const int num_layers : {1, 2}) {
    Layer layer(4000, kAllTopics, kSameTopics);
    layer.clusters().forms = {SharingForm::kScored};
    const auto dense = layer.AttendDense();
    LayerReport report, alone;
    const auto out = layer.Attend(Options(AttentionPolicy::kShare), &report, num_layers);
    EXPECT_EQ(report.pivot_heads + report.shared_heads + report.vertical_slash_heads, 0);
    EXPECT_EQ(report.scored_heads, num_layers == 1 ? 1 : 0);
    EXPECT_EQ(report.score_sharing_heads, num_layers == 1 ? 3 : 4);
    for (int head = 0; head < kNumHeads; ++head) EXPECT_LT(HeadError(out, dense, head), 0.3);

    layer.RemoveClusters();
    const auto scored = layer.Attend(Options(AttentionPolicy::kShare), &alone);
    EXPECT_LT(report.density, 1.05 * alone.density);
    EXPECT_GT(report.density, 0.9 * alone.density);
    if (num_layers == 1) {
      EXPECT_EQ(HeadError(out, scored, 0), 0.0) << "the pivot's own pattern";
    }
  }
}

TEST(ScoredHeads, AMemberThatLooksElsewhereIsScoredForItselfBesideAScoredPivot) {
  Layer layer(4000, kAllTopics, {1, 1, 2, 1});
  layer.clusters().forms = {SharingForm::kScored};
  const auto dense = layer.AttendDense();
  LayerReport report;
  const auto out = layer.Attend(Options(AttentionPolicy::kShare), &report);
  EXPECT_EQ(report.scored_heads, 2);
  EXPECT_EQ(report.score_sharing_heads, 2);
  for (int head = 0; head < kNumHeads; ++head) EXPECT_LT(HeadError(out, dense, head), 0.3);
}

// Scores see eight tokens together, so a member's own single keys have to come from its own last
// row.
TEST(ScoredHeads, HeadsThatShareScoresAddTheirOwnLastRow) {
  Layer layer(4096, kAllTopics, {1, 2, 1, 1});
  layer.clusters().forms = {SharingForm::kScored};
  AttentionOptions options = Options(AttentionPolicy::kShare);
  options.tau = 1.0f;  // head 1 shares though it looks elsewhere
  const auto dense = layer.AttendDense();
  LayerReport report;
  const auto out = layer.Attend(options, &report);
  ASSERT_EQ(report.score_sharing_heads, 3);
  const std::ptrdiff_t last_block = kBlockTokens * kNumHeads * kHeadDim;
  EXPECT_LT(
      HeadError({out.end() - last_block, out.end()}, {dense.end() - last_block, dense.end()}, 1),
      0.3);
}

}  // namespace
}  // namespace prefilld::model
