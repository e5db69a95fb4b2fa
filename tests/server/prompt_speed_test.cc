#include "server/prompt_speed.h"

#include <gtest/gtest.h>

namespace prefilld::server {
namespace {

constexpr auto kDense = model::AttentionPolicy::kDense;
constexpr auto kShare = model::AttentionPolicy::kShare;

TEST(PromptSpeed, IsTheBestOfTheLikeOnceEnoughAreKnown) {
  PromptSpeed speed;
  EXPECT_EQ(speed.latest(), 0);
  for (int i = 1; i < PromptSpeed::kMinSamples; ++i) {
    speed.Record(2000, kDense, absl::Seconds(2));
    EXPECT_EQ(speed.AtBest(4000, kDense), absl::ZeroDuration());
  }
  speed.Record(2000, kDense, absl::Seconds(1));
  EXPECT_EQ(speed.latest(), 2000);
  EXPECT_EQ(speed.AtBest(4000, kDense), absl::Seconds(2));
}

TEST(PromptSpeed, TellsNothingOfOtherPoliciesNorOfShorterPrompts) {
  PromptSpeed speed;
  for (int i = 0; i < 8; ++i) speed.Record(100'000, kDense, absl::Seconds(100));
  EXPECT_EQ(speed.AtBest(200'000, kShare), absl::ZeroDuration());
  EXPECT_EQ(speed.AtBest(99'999, kDense), absl::ZeroDuration());
  EXPECT_EQ(speed.AtBest(200'000, kDense), absl::Seconds(200));
}

TEST(PromptSpeed, LeavesOutPromptsThatAreAllOverhead) {
  PromptSpeed speed;
  for (int i = 0; i < 8; ++i) speed.Record(10, kDense, absl::Seconds(1));
  EXPECT_EQ(speed.AtBest(100'000, kDense), absl::ZeroDuration());
}

TEST(PromptSpeed, ForgetsTheDaysOfOld) {
  PromptSpeed speed;
  for (int i = 0; i < 8; ++i) speed.Record(2000, kDense, absl::Seconds(1));
  for (int i = 0; i < 32; ++i) speed.Record(2000, kDense, absl::Seconds(4));
  EXPECT_EQ(speed.AtBest(2000, kDense), absl::Seconds(4));
}

}  // namespace
}  // namespace prefilld::server
