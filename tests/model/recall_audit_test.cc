#include "model/sparse/recall_audit.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <set>
#include <vector>

#include "model/sparse/head_estimate.h"
#include "model/sparse/pattern_sharing.h"
#include "tests/model/one_layer.h"

namespace prefilld::model {
namespace {

// The tolerance of probabilities in fp32 against double precision.
constexpr double kTolerance = 1e-4;

// The attention of one layer, with the audit beside it.
struct AuditedRun {
  std::vector<float> out;
  LayerReport report;
};

AuditedRun Attend(OneLayer& layer, AttentionOptions options, const HeadClusters& clusters,
                  int layer_index = 0) {
  AuditedRun run;
  const auto workspace = SharingWorkspace::Create(&layer.device(), &layer.config(), &clusters,
                                                  layer.num_tokens(), OneLayer::kBlockTokens);
  EXPECT_TRUE(workspace.ok()) << workspace.status();
  auto sharing = PatternSharing::Create(workspace->get(), layer.num_tokens());
  EXPECT_TRUE(sharing.ok()) << sharing.status();
  (*sharing)->StartPrompt(layer.num_tokens(), options);
  EXPECT_TRUE((*sharing)->Attend(layer_index, layer.Params(&run.out), &run.report).ok());
  EXPECT_TRUE((*sharing)->Report(&run.report).ok());
  return run;
}

// Puts all heads into one cluster that always shares, whatever its members look at, so most recalls
// are low.
HeadClusters OneCluster() {
  HeadClusters clusters;
  clusters.num_clusters = 1;
  clusters.cluster_of.assign(2, std::vector<int>(OneLayer::kNumHeads, 0));
  return clusters;
}

AttentionOptions ShareAll(int64_t audit_rows) {
  AttentionOptions options;
  options.policy = AttentionPolicy::kShare;
  options.gamma = 0.8f;
  options.tau = 1.0f;
  options.coverage = 1.0f;
  options.recall_audit_rows = audit_rows;
  return options;
}

AttentionOptions VerticalSlash(int64_t audit_rows) {
  AttentionOptions options;
  options.policy = AttentionPolicy::kVerticalSlash;
  options.gamma = 0.6f;
  options.min_budget_tokens = 1;
  options.recall_audit_rows = audit_rows;
  return options;
}

TEST(RecallAudit, OfSharedHeadsIsTheTrueMassInsideWhatTheyComputed) {
  for (const int64_t num_tokens : {1024, 1000, 961}) {
    OneLayer layer(num_tokens);
    const HeadClusters clusters = OneCluster();
    const AuditedRun run = Attend(layer, ShareAll(layer.num_blocks()), clusters);
    ASSERT_EQ(run.report.shared_heads, OneLayer::kNumHeads - 1);
    ASSERT_EQ(run.report.recall.size(), size_t{OneLayer::kNumHeads - 1});  // the pivot is exact
    const std::vector<double> expected = layer.RecallOf(run.out, layer.AllRows());
    double lowest = 1.0;
    for (const HeadRecall& head : run.report.recall) {
      EXPECT_EQ(head.source, PatternSource::kPivot);
      EXPECT_NEAR(head.recall, expected[head.head], kTolerance) << "head " << head.head;
      lowest = std::min<double>(lowest, head.recall);
    }
    EXPECT_LT(lowest, 0.85);  // there was something to find
    EXPECT_NEAR(expected[0], 1.0, 1e-9);
  }
}

TEST(RecallAudit, OfVerticalSlashHeadsIsTheTrueMassInsideWhatTheyComputed) {
  OneLayer layer(1500);
  const HeadClusters clusters = OneCluster();
  const AuditedRun run = Attend(layer, VerticalSlash(layer.num_blocks()), clusters);
  ASSERT_EQ(run.report.recall.size(), size_t{OneLayer::kNumHeads});
  const std::vector<double> expected = layer.RecallOf(run.out, layer.AllRows());
  for (const HeadRecall& head : run.report.recall) {
    EXPECT_EQ(head.source, PatternSource::kVerticalSlash);
    EXPECT_NEAR(head.recall, expected[head.head], kTolerance) << "head " << head.head;
  }
}

TEST(RecallAudit, OfScoredHeadsIsTheTrueMassInsideWhatTheyComputed) {
  OneLayer layer(1500);
  HeadClusters none = OneCluster();
  none.num_clusters = 0;
  for (auto& heads : none.cluster_of) heads.assign(OneLayer::kNumHeads, HeadClusters::kNoCluster);
  AttentionOptions options = ShareAll(layer.num_blocks());
  options.score_threshold = 0.6f;
  options.last_rows_gamma = 0.2f;
  options.min_budget_tokens = 0;
  const AuditedRun run = Attend(layer, options, none);
  ASSERT_EQ(run.report.scored_heads, OneLayer::kNumHeads);
  ASSERT_EQ(run.report.recall.size(), size_t{OneLayer::kNumHeads});
  const std::vector<double> expected = layer.RecallOf(run.out, layer.AllRows());
  for (const HeadRecall& head : run.report.recall) {
    EXPECT_EQ(head.source, PatternSource::kScored);
    EXPECT_NEAR(head.recall, expected[head.head], kTolerance) << "head " << head.head;
  }
}

TEST(RecallAudit, OfSomeRowsIsThatOfTheirQueries) {
  OneLayer layer(1450);
  const HeadClusters clusters = OneCluster();
  for (const int layer_index : {0, 1}) {
    const AuditedRun run = Attend(layer, VerticalSlash(5), clusters, layer_index);
    const std::vector<int64_t> rows = AuditedRows(layer.num_blocks(), 5, layer_index);
    const std::vector<double> expected = layer.RecallOf(run.out, rows);
    for (const HeadRecall& head : run.report.recall) {
      EXPECT_EQ(head.layer, layer_index);
      EXPECT_NEAR(head.recall, expected[head.head], kTolerance) << "head " << head.head;
    }
  }
}

TEST(RecallAudit, ChangesNoResult) {
  OneLayer layer(1200);
  const HeadClusters clusters = OneCluster();
  EXPECT_EQ(Attend(layer, ShareAll(8), clusters).out, Attend(layer, ShareAll(0), clusters).out);
}

TEST(RecallAudit, IsNotMadeUnlessAskedFor) {
  OneLayer layer(1200);
  const HeadClusters clusters = OneCluster();
  EXPECT_TRUE(Attend(layer, ShareAll(0), clusters).report.recall.empty());
}

TEST(RecallAudit, OfAFullPatternAndOfDenseAttentionIsOne) {
  OneLayer layer(1000);
  const int64_t words = kernels::PatternWords(layer.num_blocks());
  const std::vector<uint32_t> full =
      kernels::testing::MakePattern(layer.num_blocks(), layer.num_blocks(), 1.0, 1);
  ASSERT_EQ(full.size(), static_cast<size_t>(layer.num_blocks() * words));
  const kernels::HeadWork work[] = {{.head = 3, .pattern = full.data()}, {.head = 5}};
  std::vector<float> out;
  kernels::AttentionParams params = layer.Params(&out);
  params.work = work;
  params.num_work = 2;
  auto audit = RecallAudit::Create(&layer.device(), OneLayer::kNumHeads);
  ASSERT_TRUE(audit.ok());
  auto estimate = HeadEstimate::Create(&layer.device(), OneLayer::kNumHeads, layer.num_tokens(),
                                       OneLayer::kBlockTokens);
  ASSERT_TRUE(estimate.ok());
  std::vector<float> recall(2);
  ASSERT_TRUE((*audit)->Measure(params, 0, 4, **estimate, absl::MakeSpan(recall)).ok());
  EXPECT_NEAR(recall[0], 1.0, 1e-5);
  EXPECT_EQ(recall[1], 1.0f);
}

TEST(AuditedRows, AreOneOfEachStretchOfThePrompt) {
  for (const int64_t num_blocks : {8, 9, 100, 1023}) {
    for (int layer = 0; layer < 40; ++layer) {
      const std::vector<int64_t> rows = AuditedRows(num_blocks, 8, layer);
      ASSERT_EQ(rows.size(), 8u);
      for (size_t i = 0; i < rows.size(); ++i) {
        EXPECT_GE(rows[i], static_cast<int64_t>(i) * num_blocks / 8);
        EXPECT_LT(rows[i], num_blocks);
        if (i > 0) {
          EXPECT_GT(rows[i], rows[i - 1]);
        }
      }
    }
  }
}

TEST(AuditedRows, ComeRoundToEveryBlock) {
  std::vector<int> visits(64);
  for (int layer = 0; layer < 80; ++layer) {
    for (const int64_t row : AuditedRows(64, 8, layer)) ++visits[row];
  }
  const auto [fewest, most] = std::minmax_element(visits.begin(), visits.end());
  EXPECT_GE(*fewest, 8);  // 10 on average
  EXPECT_LE(*most, 12);
}

TEST(AuditedRows, AreAllWhenMoreAreAskedForThanThereAre) {
  EXPECT_EQ(AuditedRows(3, 8, 2), (std::vector<int64_t>{0, 1, 2}));
  EXPECT_EQ(AuditedRows(3, 3, 0), (std::vector<int64_t>{0, 1, 2}));
}

TEST(RecallSummary, NamesTheWorstHeadAndTheFifthPercentile) {
  std::vector<HeadRecall> heads;
  for (int i = 0; i < 100; ++i) {
    heads.push_back({.layer = i / 10, .head = i % 10, .recall = static_cast<float>(i + 1) / 100});
  }
  std::reverse(heads.begin(), heads.end());
  const RecallSummary summary = Summarize(heads);
  EXPECT_NEAR(summary.mean, 0.505, 1e-6);
  EXPECT_FLOAT_EQ(summary.fifth_percentile, 0.05f);
  EXPECT_FLOAT_EQ(summary.lowest.recall, 0.01f);
  EXPECT_EQ(summary.lowest.layer, 0);
  EXPECT_EQ(summary.lowest.head, 0);
  EXPECT_FLOAT_EQ(Summarize({{.recall = 0.7f}}).fifth_percentile, 0.7f);
}

}  // namespace
}  // namespace prefilld::model
