#include "server/prompt_speed.h"

#include <gtest/gtest.h>

namespace prefilld::server {
namespace {

constexpr auto kDense = model::AttentionPolicy::kDense;
constexpr auto kShare = model::AttentionPolicy::kShare;
constexpr absl::Time kNow = absl::FromUnixSeconds(1'000'000'000);

TEST(PromptSpeed, IsTheBestOfTheLikeOnceEnoughAreKnown) {
  PromptSpeed speed;
  EXPECT_EQ(speed.latest(), 0);
  for (int i = 1; i < PromptSpeed::kMinSamples; ++i) {
    speed.Record(kNow, 2000, kDense, absl::Seconds(2));
    EXPECT_EQ(speed.AtBest(kNow, 4000, kDense), absl::ZeroDuration());
  }
  speed.Record(kNow, 2000, kDense, absl::Seconds(1));
  EXPECT_EQ(speed.latest(), 2000);
  EXPECT_EQ(speed.AtBest(kNow, 4000, kDense), absl::Seconds(2));
}

TEST(PromptSpeed, TellsNothingOfOtherPoliciesNorOfShorterPrompts) {
  PromptSpeed speed;
  for (int i = 0; i < 8; ++i) speed.Record(kNow, 100'000, kDense, absl::Seconds(100));
  EXPECT_EQ(speed.AtBest(kNow, 200'000, kShare), absl::ZeroDuration());
  EXPECT_EQ(speed.AtBest(kNow, 99'999, kDense), absl::ZeroDuration());
  EXPECT_EQ(speed.AtBest(kNow, 200'000, kDense), absl::Seconds(200));
}

TEST(PromptSpeed, LeavesOutPromptsThatAreAllOverhead) {
  PromptSpeed speed;
  for (int i = 0; i < 8; ++i) speed.Record(kNow, 10, kDense, absl::Seconds(1));
  EXPECT_EQ(speed.AtBest(kNow, 100'000, kDense), absl::ZeroDuration());
}

// Ten prompts together finish sooner than one by one, but each takes longer.
TEST(PromptSpeed, TellsBatchesFromPromptsAlone) {
  PromptSpeed speed;
  EXPECT_EQ(speed.BatchedAtBest(kNow, 4000), absl::ZeroDuration());
  for (int i = 0; i < 8; ++i) {
    speed.Record(kNow, 2000, kDense, absl::Seconds(2));
    speed.RecordBatch(kNow, 20'000, absl::Seconds(4));
  }
  EXPECT_EQ(speed.AtBest(kNow, 40'000, kDense), absl::Seconds(40));
  EXPECT_EQ(speed.BatchedAtBest(kNow, 4000), absl::Milliseconds(800));
  EXPECT_EQ(speed.BatchedAtBest(kNow, 20'000), absl::Seconds(4));
  EXPECT_EQ(speed.BatchedAtBest(kNow, 20'001), absl::ZeroDuration()) << "larger ones are faster";
  EXPECT_EQ(speed.latest(), 5000);
  const absl::Time later = kNow + PromptSpeed::kMaxAge + absl::Seconds(1);
  EXPECT_EQ(speed.BatchedAtBest(later, 4000), absl::ZeroDuration());
}

TEST(PromptSpeed, ForgetsTheDaysOfOld) {
  PromptSpeed speed;
  for (int i = 0; i < 8; ++i) speed.Record(kNow, 2000, kDense, absl::Seconds(1));
  for (int i = 0; i < 32; ++i) speed.Record(kNow, 2000, kDense, absl::Seconds(4));
  EXPECT_EQ(speed.AtBest(kNow, 2000, kDense), absl::Seconds(4));
}

TEST(PromptSpeed, TellsNothingOnceAllItKnowsIsOld) {
  PromptSpeed speed;
  for (int i = 0; i < 8; ++i) speed.Record(kNow, 2000, kDense, absl::Seconds(4));
  EXPECT_EQ(speed.AtBest(kNow + PromptSpeed::kMaxAge, 2000, kDense), absl::Seconds(4));
  const absl::Time later = kNow + PromptSpeed::kMaxAge + absl::Seconds(1);
  EXPECT_EQ(speed.AtBest(later, 2000, kDense), absl::ZeroDuration());
  EXPECT_EQ(speed.latest(), 500);
}

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

// A layer of n tokens takes 10 n + n * n / 1000 microseconds.
TEST(StepCost, GoesByAStraightLinePerTokenBetweenLengthsAndBeyondThem) {
  StepCost costs;
  costs.Record(kDense, 1000, absl::Milliseconds(11));
  EXPECT_EQ(costs.Layer(kDense, 4000), absl::Milliseconds(44)) << "one length tells no growth";
  costs.Record(kDense, 10'000, absl::Milliseconds(200));
  costs.Record(kDense, 16'000, absl::Milliseconds(416));
  const auto near = [&](int64_t num_tokens, absl::Duration expected) {
    EXPECT_NEAR(absl::FDivDuration(costs.Layer(kDense, num_tokens), expected), 1, 1e-6)
        << num_tokens;
  };
  near(4000, absl::Milliseconds(56));
  near(12'000, absl::Milliseconds(264));
  near(100'000, absl::Milliseconds(11'000));
  near(100, absl::Microseconds(1100));  // as fast per token as the least length
}

TEST(StepCost, CountsTheKeysOfACachedPrefix) {
  StepCost costs;
  costs.Record(kDense, 1000, absl::Milliseconds(11));
  costs.Record(kDense, 10'000, absl::Milliseconds(200));
  const auto cached = costs.LayerBehind(kDense, /*num_cached=*/9000, /*num_tokens=*/1000);
  EXPECT_NEAR(absl::ToDoubleMilliseconds(cached), 10 + 100 - 81, 0.01);
  EXPECT_EQ(costs.LayerBehind(kDense, 0, 1000), absl::Milliseconds(11));
  costs.Record(kShare, 1000, absl::Milliseconds(10));
  costs.Record(kShare, 10'000, absl::Milliseconds(20));
  EXPECT_EQ(costs.LayerBehind(kShare, 9000, 1000), absl::Milliseconds(10)) << "at least its own";
}

TEST(StepCost, DoesNotTakeLongerPromptsForEverFasterOnes) {
  StepCost costs;
  costs.Record(kShare, 1000, absl::Milliseconds(20));
  costs.Record(kShare, 10'000, absl::Milliseconds(100));
  EXPECT_EQ(costs.Layer(kShare, 100'000), absl::Milliseconds(1000));
}

TEST(StepCost, TwoLengthsThatAreNearlyEqualSayNothingAboutGreaterOnes) {
  StepCost costs;
  costs.Record(kDense, 1023, absl::Milliseconds(10));
  costs.Record(kDense, 1025, absl::Milliseconds(11));
  EXPECT_NEAR(absl::ToDoubleMilliseconds(costs.Layer(kDense, 102'500)), 1100, 1);
}

TEST(MeasuredAtStart, IsWhatTheFirstPromptsAreExpectedToTake) {
  model::EngineInfo engine;
  engine.config.num_layers = 10;
  engine.default_attention.crossover_tokens = 5000;
  engine.layer_times = {
      {kDense, 2000, 2000}, {kDense, 8000, 16'000}, {kShare, 2000, 3000}, {kShare, 8000, 8000}};
  StepCost costs;
  PromptSpeed speed;
  RecordMeasuredAtStart(engine, kNow, costs, speed);
  constexpr auto kAuto = model::AttentionPolicy::kAuto;
  EXPECT_EQ(costs.Layer(kDense, 8000), absl::Milliseconds(16));
  EXPECT_EQ(costs.Layer(kShare, 8000), absl::Milliseconds(8));
  EXPECT_EQ(costs.Layer(kAuto, 2000), absl::Milliseconds(2)) << "dense";
  EXPECT_EQ(costs.Layer(kAuto, 8000), absl::Milliseconds(8)) << "shares";
  EXPECT_EQ(speed.AtBest(kNow, 2000, kDense), absl::Milliseconds(20));
  EXPECT_EQ(speed.AtBest(kNow, 8000, kAuto), absl::Milliseconds(80));
  EXPECT_GT(speed.latest(), 0);
  const absl::Time later = kNow + PromptSpeed::kMaxAge + absl::Seconds(1);
  EXPECT_EQ(speed.AtBest(later, 2000, kDense), absl::ZeroDuration());
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
