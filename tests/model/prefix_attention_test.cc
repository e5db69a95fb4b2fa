// Tests sparse attention of queries that come behind keys which exist already.
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <vector>

#include "model/sparse/pattern_sharing.h"
#include "tests/model/one_layer.h"

namespace prefilld::model {
namespace {

struct LayerRun {
  std::vector<float> out;
  LayerReport report;
};

// Computes the queries from `first` on.
LayerRun Attend(OneLayer& layer, const AttentionOptions& options, int64_t first) {
  HeadClusters clusters;
  clusters.num_clusters = 1;
  clusters.cluster_of.assign(2, std::vector<int>(OneLayer::kNumHeads, 0));
  const auto workspace = SharingWorkspace::Create(&layer.device(), &layer.config(), &clusters,
                                                  layer.num_tokens(), OneLayer::kBlockTokens);
  EXPECT_TRUE(workspace.ok()) << workspace.status();
  auto sharing = PatternSharing::Create(workspace->get(), layer.num_tokens());
  EXPECT_TRUE(sharing.ok()) << sharing.status();
  (*sharing)->StartPrompt(layer.num_tokens(), options);
  LayerRun run;
  kernels::AttentionParams params = layer.Params(&run.out);
  params.num_queries = layer.num_tokens() - first;
  params.q = params.out = &run.out[first * OneLayer::kNumHeads * OneLayer::kHeadDim];
  EXPECT_TRUE((*sharing)->Attend(0, params, &run.report).ok());
  EXPECT_TRUE((*sharing)->Report(&run.report).ok());
  return run;
}

AttentionOptions Sparse(AttentionPolicy policy, float coverage = 1.0f) {
  AttentionOptions options;
  options.policy = policy;
  options.gamma = policy == AttentionPolicy::kShare ? 0.8f : 0.3f;
  options.tau = 1.0f;
  options.coverage = coverage;
  options.score_threshold = 0.5f;
  options.last_rows_gamma = 0.3f;
  options.min_budget_tokens = 0;
  return options;
}

// The estimate comes from the last block of queries, and the pattern of a pivot from each row of
// blocks by itself. So what a query attends to does not depend on whether those before it are
// computed.
TEST(PrefixAttention, LastQueriesGetWhatTheyGetInTheWholePrompt) {
  for (const int64_t num_tokens : {1024, 1000}) {
    // Without coverage no head shares, so all are scored.
    for (const AttentionOptions& options :
         {Sparse(AttentionPolicy::kVerticalSlash), Sparse(AttentionPolicy::kShare),
          Sparse(AttentionPolicy::kShare, /*coverage=*/0.0f)}) {
      OneLayer layer(num_tokens);
      const LayerRun whole = Attend(layer, options, 0);
      EXPECT_LT(whole.report.density, 0.9);
      for (const int64_t first : {128, 512, 832}) {
        SCOPED_TRACE(testing::Message() << Name(options.policy) << " from " << first);
        const LayerRun last = Attend(layer, options, first);
        EXPECT_EQ(last.report.pivot_heads, whole.report.pivot_heads);
        EXPECT_EQ(last.report.shared_heads, whole.report.shared_heads);
        EXPECT_EQ(last.report.scored_heads, whole.report.scored_heads);
        EXPECT_EQ(last.report.vertical_slash_heads, whole.report.vertical_slash_heads);
        EXPECT_GT(last.report.density, 0.0);
        EXPECT_LE(last.report.density, 1.0);
        double largest = 0;
        for (size_t i = first * OneLayer::kNumHeads * OneLayer::kHeadDim; i < whole.out.size();
             ++i) {
          largest = std::max(largest, std::abs(double{last.out[i]} - whole.out[i]));
        }
        EXPECT_LT(largest, 1e-6);
      }
    }
  }
}

// With every query block computed for its own sake, the density is that of the rows alone.
TEST(PrefixAttention, DensityCountsTheBlocksOfTheQueriesAlone) {
  OneLayer layer(1024);
  AttentionOptions all = Sparse(AttentionPolicy::kVerticalSlash);
  all.min_budget_tokens = 1024;
  EXPECT_DOUBLE_EQ(Attend(layer, all, 0).report.density, 1.0);
  EXPECT_DOUBLE_EQ(Attend(layer, all, 640).report.density, 1.0);
}

}  // namespace
}  // namespace prefilld::model
