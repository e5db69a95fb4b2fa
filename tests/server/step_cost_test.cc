#include "server/step_cost.h"

#include <gtest/gtest.h>

namespace prefilld::server {
namespace {

constexpr auto kDense = model::AttentionPolicy::kDense;
constexpr auto kShare = model::AttentionPolicy::kShare;

TEST(StepCost, OrdersByLengthBeforeAnythingIsMeasured) {
  const StepCost costs;
  EXPECT_LT(costs.Layer(kDense, 100), costs.Layer(kShare, 200));
}

TEST(StepCost, PredictsWhatItMeasured) {
  StepCost costs;
  costs.Record(kDense, 1000, absl::Milliseconds(10));
  costs.Record(kDense, 100'000, absl::Milliseconds(4000));
  EXPECT_EQ(costs.Layer(kDense, 1000), absl::Milliseconds(10));
  EXPECT_EQ(costs.Layer(kDense, 100'000), absl::Milliseconds(4000));
}

TEST(StepCost, TakesTheNearestLengthBelowOrElseAbove) {
  StepCost costs;
  costs.Record(kDense, 1000, absl::Milliseconds(10));
  costs.Record(kDense, 100'000, absl::Milliseconds(4000));
  EXPECT_EQ(costs.Layer(kDense, 2000), absl::Milliseconds(20));
  EXPECT_EQ(costs.Layer(kDense, 100), absl::Milliseconds(1));
  EXPECT_EQ(costs.Layer(kDense, 1'000'000), absl::Milliseconds(40'000));
}

TEST(StepCost, KeepsPoliciesApart) {
  StepCost costs;
  costs.Record(kDense, 1000, absl::Milliseconds(10));
  costs.Record(kShare, 100'000, absl::Milliseconds(500));
  EXPECT_EQ(costs.Layer(kShare, 1000), absl::Milliseconds(5));
  EXPECT_EQ(costs.Layer(kDense, 100'000), absl::Milliseconds(1000));
}

TEST(StepCost, FollowsAChangeAndIgnoresOneOddLayer) {
  StepCost costs;
  for (int i = 0; i < 20; ++i) costs.Record(kDense, 1000, absl::Milliseconds(10));
  costs.Record(kDense, 1000, absl::Milliseconds(30));
  EXPECT_LE(costs.Layer(kDense, 1000), absl::Milliseconds(15));
  for (int i = 0; i < 20; ++i) costs.Record(kDense, 1000, absl::Milliseconds(30));
  EXPECT_GE(costs.Layer(kDense, 1000), absl::Milliseconds(29));
}

}  // namespace
}  // namespace prefilld::server
