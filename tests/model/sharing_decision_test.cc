#include "model/sparse/sharing_decision.h"

#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/sparse/head_clusters.h"

namespace prefilld::model {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr int kNone = HeadClusters::kNoCluster;
const double kLargestDistance = std::sqrt(std::log(2.0));

AttentionOptions Share() {
  AttentionOptions options;
  options.policy = AttentionPolicy::kShare;
  return options;
}

ClusterPivot Pivot(int layer, std::vector<float> estimate, bool worth_sharing = true) {
  ClusterPivot pivot;
  pivot.layer = layer;
  pivot.head = 0;
  pivot.estimate = std::move(estimate);
  pivot.worth_sharing = worth_sharing;
  return pivot;
}

TEST(JensenShannonDistance, EqualIsZeroAndDisjointIsTheLargest) {
  EXPECT_EQ(JensenShannonDistance({0.25f, 0.75f}, {0.25f, 0.75f}), 0.0);
  EXPECT_NEAR(JensenShannonDistance({1.0f, 0.0f}, {0.0f, 1.0f}), kLargestDistance, 1e-7);
}

TEST(JensenShannonDistance, ZerosAreNoNaN) {
  // 0.5 (1 ln(1 / 0.75)) + 0.5 (0.5 ln(0.5 / 0.75) + 0.5 ln(0.5 / 0.25)) = 0.21576...
  const double distance = JensenShannonDistance({1.0f, 0.0f, 0.0f}, {0.5f, 0.5f, 0.0f});
  EXPECT_NEAR(distance, std::sqrt(0.2157615543388357), 1e-7);
  EXPECT_EQ(distance, JensenShannonDistance({0.5f, 0.5f, 0.0f}, {1.0f, 0.0f, 0.0f}));
}

// The masses span many orders of magnitude, with zeros among them.
TEST(JensenShannonDistance, EqualsTheFormulaInDouble) {
  std::mt19937 random(1);
  std::exponential_distribution<double> exponential;
  for (const size_t n : {1, 7, 8, 100, 1024, 8191}) {
    for (const int power : {1, 4, 12}) {
      std::vector<float> p(n), q(n);
      for (std::vector<float>* mass : {&p, &q}) {
        for (float& m : *mass) m = static_cast<float>(std::pow(exponential(random), power));
        if (n > 3) (*mass)[random() % n] = 0.0f;
        const double sum = std::accumulate(mass->begin(), mass->end(), 0.0);
        for (float& m : *mass) m = static_cast<float>(m / sum);
      }
      double expected = 0.0;
      for (size_t i = 0; i < n; ++i) {
        const double m = 0.5 * (static_cast<double>(p[i]) + q[i]);
        if (p[i] > 0) expected += 0.5 * p[i] * std::log(p[i] / m);
        if (q[i] > 0) expected += 0.5 * q[i] * std::log(q[i] / m);
      }
      const double distance = JensenShannonDistance(p, q);
      EXPECT_NEAR(distance * distance, expected, 2e-7) << n << " elements, power " << power;
      EXPECT_EQ(distance, JensenShannonDistance(q, p));
    }
  }
}

TEST(DistanceFromUniform, GrowsWithSparsity) {
  EXPECT_NEAR(DistanceFromUniform({0.25f, 0.25f, 0.25f, 0.25f}), 0.0, 1e-7);
  const double half = DistanceFromUniform({0.5f, 0.5f, 0.0f, 0.0f});
  const double single = DistanceFromUniform({1.0f, 0.0f, 0.0f, 0.0f});
  EXPECT_GT(half, 0.4);
  EXPECT_GT(single, half);
  EXPECT_LT(single, kLargestDistance);
}

TEST(ChoosePivots, FirstHeadOfEveryClusterWithoutAPivot) {
  const std::vector<float> estimate(6 * 2, 0.5f);
  std::vector<ClusterPivot> pivots(3);
  pivots[1] = Pivot(0, {0.5f, 0.5f});
  const std::vector<int> cluster_of = {kNone, 2, 1, 2, 0, 0};
  EXPECT_THAT(ChoosePivots(cluster_of, estimate, pivots, Share()), ElementsAre(1, 4));
}

TEST(ChoosePivots, DeltaRulePassesASparseHeadOver) {
  const std::vector<float> estimate = {1.0f, 0.0f, 0.5f, 0.5f};
  const std::vector<int> cluster_of = {0, 0};
  AttentionOptions options = Share();
  EXPECT_THAT(ChoosePivots(cluster_of, estimate, std::vector<ClusterPivot>(1), options),
              ElementsAre(0))
      << "delta 1 is off";
  options.delta = 0.3f;
  EXPECT_THAT(ChoosePivots(cluster_of, estimate, std::vector<ClusterPivot>(1), options),
              ElementsAre(1));
}

TEST(ChoosePivots, NoneWhereCoverageZeroForbidsSharing) {
  AttentionOptions options = Share();
  options.coverage = 0.0f;
  EXPECT_THAT(ChoosePivots({0}, {1.0f}, std::vector<ClusterPivot>(1), options), IsEmpty());
}

TEST(DecideHead, SharesBelowTauAndNotAtIt) {
  const std::vector<float> estimate = {1.0f, 0.0f};
  const ClusterPivot far = Pivot(0, {0.0f, 1.0f});
  const ClusterPivot near = Pivot(0, {0.9f, 0.1f});
  AttentionOptions options = Share();
  options.tau = 0.4f;
  EXPECT_EQ(DecideHead(1, estimate, &near, options), HeadRole::kShared);
  EXPECT_EQ(DecideHead(1, estimate, &far, options), HeadRole::kScored);
  options.tau = 1.0f;
  EXPECT_EQ(DecideHead(1, estimate, &far, options), HeadRole::kShared);
  options.tau = 0.0f;
  const ClusterPivot same = Pivot(0, estimate);
  EXPECT_EQ(DecideHead(1, estimate, &same, options), HeadRole::kScored);
}

TEST(DecideHead, NeedsAPivotThatIsWorthSharing) {
  const std::vector<float> estimate = {0.5f, 0.5f};
  const ClusterPivot absent;
  const ClusterPivot not_worth_it = Pivot(0, estimate, /*worth_sharing=*/false);
  EXPECT_EQ(DecideHead(1, estimate, nullptr, Share()), HeadRole::kScored);
  EXPECT_EQ(DecideHead(1, estimate, &absent, Share()), HeadRole::kScored);
  EXPECT_EQ(DecideHead(1, estimate, &not_worth_it, Share()), HeadRole::kScored);
}

TEST(DecideHead, SameLayerSharingIsASwitch) {
  const std::vector<float> estimate = {0.5f, 0.5f};
  const ClusterPivot pivot = Pivot(3, estimate);
  AttentionOptions options = Share();
  EXPECT_EQ(DecideHead(3, estimate, &pivot, options), HeadRole::kShared);
  options.same_layer_sharing = false;
  EXPECT_EQ(DecideHead(3, estimate, &pivot, options), HeadRole::kScored);
  EXPECT_EQ(DecideHead(4, estimate, &pivot, options), HeadRole::kShared);
}

TEST(DecideHead, DeltaRuleKeepsSparseHeadsFromSharing) {
  const std::vector<float> sparse = {1.0f, 0.0f, 0.0f, 0.0f};
  const ClusterPivot pivot = Pivot(0, sparse);
  AttentionOptions options = Share();
  options.delta = 0.3f;
  EXPECT_EQ(DecideHead(1, sparse, &pivot, options), HeadRole::kScored);
}

TEST(DecideHead, AnEstimateThatIsNoNumberNeverShares) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const ClusterPivot pivot = Pivot(0, {0.5f, 0.5f});
  EXPECT_EQ(DecideHead(1, {nan, nan}, &pivot, Share()), HeadRole::kScored);
}

TEST(WorthSharing, WhenVerticalSlashCoversTooLittle) {
  const PatternFigures pattern = {.mass = 0.9, .blocks = 10};
  EXPECT_TRUE(WorthSharing(pattern, {.mass = 0.84, .blocks = 10}, 0.85f));
  EXPECT_FALSE(WorthSharing(pattern, {.mass = 0.86, .blocks = 10}, 0.85f));
  EXPECT_TRUE(WorthSharing(pattern, {.mass = 1.0, .blocks = 10}, 1.0f)) << "1 shares always";
  EXPECT_FALSE(WorthSharing(pattern, {.mass = 0.0, .blocks = 10}, 0.0f)) << "0 shares never";
}

TEST(WorthSharing, WhenVerticalSlashCostsNotablyMore) {
  const PatternFigures pattern = {.mass = 0.9, .blocks = 100};
  EXPECT_FALSE(WorthSharing(pattern, {.mass = 0.95, .blocks = 125}, 0.85f));
  EXPECT_TRUE(WorthSharing(pattern, {.mass = 0.95, .blocks = 126}, 0.85f));
  EXPECT_FALSE(WorthSharing(pattern, {.mass = 0.95, .blocks = 126}, 0.0f)) << "0 shares never";
}

}  // namespace
}  // namespace prefilld::model
