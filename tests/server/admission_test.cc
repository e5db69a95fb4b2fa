#include "server/admission.h"

#include <utility>

#include <gmock/gmock.h>

#include "server/refusal_cause.h"

namespace prefilld::server {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr auto kDense = model::AttentionPolicy::kDense;
constexpr absl::Time kNow = absl::FromUnixSeconds(1'000'000'000);

WaitingPrompt Long(int64_t num_tokens, absl::Duration time_left = absl::InfiniteDuration()) {
  return {.num_tokens = num_tokens, .policy = kDense, .time_left = time_left};
}

WaitingPrompt Short(int64_t num_tokens, absl::Duration time_left = absl::InfiniteDuration()) {
  return {.num_tokens = num_tokens,
          .batch_tokens = num_tokens,
          .policy = kDense,
          .time_left = time_left};
}

// Prompts alone take one second per thousand tokens, and batches take half a second.
PromptSpeed Measured() {
  PromptSpeed speed;
  for (int i = 0; i < PromptSpeed::kMinSamples; ++i) {
    speed.Record(kNow, 2000, kDense, absl::Seconds(2));
    speed.RecordBatch(kNow, 10'000, absl::Seconds(5));
  }
  return speed;
}

TEST(CheckRoom, LetsSoManyWaitBehindWhatComputes) {
  const QueueLimits limits = {.capacity = 2, .max_queued_tokens = 1000};
  const WaitingLine one = {.prompts = {Long(10)}, .computing = true};
  EXPECT_TRUE(CheckRoom(limits, one, Long(10)).ok());
  const WaitingLine two = {.prompts = {Long(10), Long(10)}, .computing = true};
  const absl::Status full = CheckRoom(limits, two, Long(10));
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(full.message(), HasSubstr("2 requests wait; at most 2"));
}

TEST(CheckRoom, DoesNotCountTheHeadOfAnIdleServerAsWaiting) {
  const QueueLimits limits = {.capacity = 1, .max_queued_tokens = 1000};
  EXPECT_TRUE(CheckRoom(limits, {.prompts = {Long(10)}}, Long(10)).ok());
  EXPECT_FALSE(CheckRoom(limits, {.prompts = {Long(10), Long(10)}}, Long(10)).ok());
}

TEST(CheckRoom, WithoutAQueueTakesOnePromptAtATime) {
  const QueueLimits limits = {.capacity = 0, .max_queued_tokens = 1000};
  EXPECT_TRUE(CheckRoom(limits, {}, Long(10)).ok());
  EXPECT_FALSE(CheckRoom(limits, {.prompts = {}, .computing = true}, Long(10)).ok());
}

TEST(CheckRoom, BoundsTheTokensThatWaitButForTheFirst) {
  const QueueLimits limits = {.capacity = 64, .max_queued_tokens = 1000};
  EXPECT_TRUE(CheckRoom(limits, {.prompts = {}, .computing = true}, Long(1500)).ok());
  const WaitingLine line = {.prompts = {Long(900)}, .computing = true};
  EXPECT_TRUE(CheckRoom(limits, line, Long(100)).ok());
  EXPECT_THAT(CheckRoom(limits, line, Long(101)).message(),
              HasSubstr("900 tokens wait and 101 came; at most 1000"));
}

WaitingPrompt LongOf(int tenant, int64_t num_tokens, int priority = 0) {
  WaitingPrompt prompt = Long(num_tokens);
  prompt.tenant = tenant;
  prompt.priority = priority;
  return prompt;
}

// A queue of 8 places, 1 of which is the first tenant's own and 3 the second's.
QueueLimits TwoTenants() {
  return {.capacity = 8,
          .max_queued_tokens = 8000,
          .tenants = {{.name = "one", .weight = 1}, {.name = "three", .weight = 3}}};
}

TEST(CheckRoom, KeepsHalfOfThePlacesForTheTenantsByTheirWeights) {
  WaitingLine line = {.prompts = {}, .computing = true};
  int taken = 0;
  for (; CheckRoom(TwoTenants(), line, LongOf(0, 1)).ok(); ++taken) {
    line.prompts.push_back(LongOf(0, 1));
  }
  EXPECT_EQ(taken, 1 + 4) << "its own and those for all";
  EXPECT_THAT(CheckRoom(TwoTenants(), line, LongOf(0, 1)).message(),
              HasSubstr("for tenant one, who has 5 requests and 5 tokens in it: 5 requests wait"));
  EXPECT_EQ(CauseOf(CheckRoom(TwoTenants(), line, LongOf(0, 1))), RefusalCause::kTenantShare);
  for (taken = 0; CheckRoom(TwoTenants(), line, LongOf(1, 1)).ok(); ++taken) {
    line.prompts.push_back(LongOf(1, 1));
  }
  EXPECT_EQ(taken, 3);
  for (const int tenant : {0, 1}) {
    EXPECT_EQ(CauseOf(CheckRoom(TwoTenants(), line, LongOf(tenant, 1))), RefusalCause::kQueueFull);
  }
}

TEST(CheckRoom, KeepsNothingForATenantThatIsGone) {
  QueueLimits limits = TwoTenants();
  limits.tenants[1].is_gone = true;
  WaitingLine line = {.prompts = {LongOf(1, 1)}, .computing = true};
  int taken = 0;
  for (; CheckRoom(limits, line, LongOf(0, 1)).ok(); ++taken) line.prompts.push_back(LongOf(0, 1));
  EXPECT_EQ(taken, 7) << "all places but the one that the tenant still has";
}

TEST(CheckRoom, KeepsHalfOfTheTokensToo) {
  const WaitingLine line = {.prompts = {LongOf(0, 5000), LongOf(1, 1000)}, .computing = true};
  EXPECT_EQ(CauseOf(CheckRoom(TwoTenants(), line, LongOf(0, 1))), RefusalCause::kTenantShare);
  EXPECT_TRUE(CheckRoom(TwoTenants(), line, LongOf(1, 2000)).ok());
  EXPECT_EQ(CauseOf(CheckRoom(TwoTenants(), line, LongOf(1, 2001))), RefusalCause::kQueueFull);
}

TEST(CheckRoom, LetsOneRequestOfEachTenantWait) {
  QueueLimits limits = {.capacity = 2, .max_queued_tokens = 10, .tenants = {}};
  WaitingLine line = {.prompts = {}, .computing = true};
  for (int t = 0; t < 5; ++t) limits.tenants.push_back({.name = std::string(1, 'a' + t)});
  for (int t = 0; t < 5; ++t) {
    EXPECT_TRUE(CheckRoom(limits, line, LongOf(t, 1000)).ok());
    line.prompts.push_back(LongOf(t, 1000));
    EXPECT_FALSE(CheckRoom(limits, line, LongOf(t, 1)).ok());
  }
}

TEST(RetryDelay, IsTheTimeThatTheWaitingTokensTake) {
  const WaitingLine line = {.prompts = {Long(10'000), Long(2000)}};
  EXPECT_EQ(RetryDelay({}, line, 0, 4000), absl::Seconds(3));
  EXPECT_EQ(RetryDelay({}, line, 0, /*tokens_per_second=*/0), absl::Seconds(12));
}

TEST(RetryDelay, StaysBetweenASecondAndAMinute) {
  EXPECT_EQ(RetryDelay({}, {.prompts = {Long(10)}}, 0, 1000), absl::Seconds(1));
  EXPECT_EQ(RetryDelay({}, {.prompts = {Long(1'000'000)}}, 0, 1000), absl::Seconds(60));
}

TEST(RetryDelay, ComesFromTheTenantsOwnBacklogAndItsShare) {
  const WaitingLine line = {.prompts = {LongOf(0, 2000), LongOf(1, 30'000)}};
  EXPECT_EQ(RetryDelay(TwoTenants(), line, 0, 1000), absl::Seconds(8)) << "2 s at a quarter";
  EXPECT_EQ(RetryDelay(TwoTenants(), line, 1, 1000), absl::Seconds(40));
  EXPECT_EQ(RetryDelay(TwoTenants(), {.prompts = {LongOf(0, 2000)}}, 0, 1000), absl::Seconds(2));
}

TEST(CheckDeadline, CountsWhatIsNotCachedAlone) {
  const PromptSpeed speed = Measured();
  WaitingPrompt prompt = Long(100'000, absl::Seconds(4));
  EXPECT_FALSE(CheckDeadline({}, prompt, speed, kNow).ok());
  prompt.cached_tokens = 95'000;
  EXPECT_TRUE(CheckDeadline({}, prompt, speed, kNow).ok());
  WaitingPrompt before = Long(4000);
  before.cached_tokens = 1000;
  EXPECT_EQ(QueueAtBest({.prompts = {before}}, prompt, speed, kNow), absl::Seconds(3));
}

TEST(CheckDeadline, RefusesWhatLeavesLessThanHalfOfTheTime) {
  const PromptSpeed speed = Measured();
  const WaitingLine line = {.prompts = {Long(3000), Long(8000), Long(3000)}};
  // The queue takes 6 s, and the prompt 4 s.
  EXPECT_TRUE(CheckDeadline(line, Long(4000, absl::Seconds(5)), speed, kNow).ok());
  const absl::Status refused =
      CheckDeadline(line, Long(4000, absl::Milliseconds(4900)), speed, kNow);
  EXPECT_EQ(refused.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(refused.message(),
            "the deadline is in 4.9s; at the best speed of late the queue takes 6s and this prompt "
            "4s");
}

TEST(CheckDeadline, TriesWhatHasNoDeadlineOrIsNotMeasured) {
  const WaitingLine line = {.prompts = {Long(1'000'000)}};
  EXPECT_TRUE(CheckDeadline(line, Long(4000), Measured(), kNow).ok());
  EXPECT_TRUE(CheckDeadline(line, Long(4000, absl::Milliseconds(1)), PromptSpeed(), kNow).ok());
}

TEST(QueueAtBest, SumsThoseThatComputeAloneAndThoseThatAreBatched) {
  const WaitingLine line = {.prompts = {Long(3000), Short(500), Long(2000), Short(1500)}};
  EXPECT_EQ(QueueAtBest(line, Long(3000), Measured(), kNow), absl::Seconds(3 + 2 + 1));
}

TEST(QueueAtBest, LeavesOutWhatTakesLonger) {
  const WaitingLine line = {.prompts = {Long(3000), Long(5000), Long(2000)}};
  EXPECT_EQ(QueueAtBest(line, Long(3000), Measured(), kNow), absl::Seconds(3 + 2));
}

TEST(QueueAtBest, EndsAtTheFirstBatchForAPromptThatCanJoinIt) {
  const WaitingLine line = {.prompts = {Long(3000), Short(500), Long(2000), Short(1500)}};
  EXPECT_EQ(QueueAtBest(line, Short(4000), Measured(), kNow), absl::Seconds(3));
}

TEST(QueueAtBest, LeavesOutOtherTenantsAndLowerClasses) {
  const WaitingLine line = {
      .prompts = {LongOf(0, 2000), LongOf(1, 2200), LongOf(1, 2500, 1), LongOf(0, 2300, -1)}};
  EXPECT_EQ(QueueAtBest(line, LongOf(0, 3000), Measured(), kNow), absl::Milliseconds(4500));
}

TEST(ChoosePass, FillsABatchByClassesAndThenByTheTenantsTimes) {
  std::vector<WaitingPrompt> line(5, Short(100));
  line[1].tenant_time = absl::Seconds(2);
  line[2].tenant_time = absl::Seconds(1);
  line[3].tenant_time = absl::Seconds(3);
  line[4].tenant_time = absl::Seconds(3);
  line[4].priority = 1;
  EXPECT_THAT(ChoosePass(line, /*head=*/0, 300, PromptSpeed(), StepCost(), kNow),
              ElementsAre(0, 2, 4));
}

TEST(ChoosePass, ShortPromptIsBatchedWithTheHead) {
  EXPECT_THAT(
      ChoosePass({Short(100), Short(200)}, /*head=*/0, 1000, PromptSpeed(), StepCost(), kNow),
      ElementsAre(0, 1));
}

TEST(ChoosePass, ALongHeadComputesAlone) {
  EXPECT_THAT(
      ChoosePass({Long(5000), Short(200)}, /*head=*/0, 1000, PromptSpeed(), StepCost(), kNow),
      ElementsAre(0));
}

TEST(ChoosePass, TakesWhatFitsInTheOrderOfTheLineAndOvertakesTheRest) {
  const std::vector<WaitingPrompt> line = {Short(600), Long(5000), Short(500),
                                           Short(300), Short(100), Short(1)};
  EXPECT_THAT(ChoosePass(line, /*head=*/0, 1000, PromptSpeed(), StepCost(), kNow),
              ElementsAre(0, 3, 4));
}

TEST(ChoosePass, CountsPaddingNotTokens) {
  WaitingPrompt padded = Short(1);
  padded.batch_tokens = 600;
  EXPECT_THAT(
      ChoosePass({padded, padded, Short(400)}, /*head=*/0, 1000, PromptSpeed(), StepCost(), kNow),
      ElementsAre(0, 2));
}

TEST(ChoosePass, StartsFromAnyHead) {
  EXPECT_THAT(ChoosePass({Short(600), Long(5000), Short(500), Short(300)}, /*head=*/2, 1000,
                         PromptSpeed(), StepCost(), kNow),
              ElementsAre(2, 3));
  EXPECT_THAT(ChoosePass({Short(100), Long(5000), Short(500)}, /*head=*/2, 1000, PromptSpeed(),
                         StepCost(), kNow),
              ElementsAre(0, 2));
}

TEST(ChoosePass, LeavesOutWhatHasEnded) {
  WaitingPrompt ended = Short(10);
  ended.ended = true;
  EXPECT_THAT(
      ChoosePass({Short(10), ended, Short(10)}, /*head=*/0, 1000, PromptSpeed(), StepCost(), kNow),
      ElementsAre(0, 2));
}

// Batches take half a second per thousand tokens.
TEST(ChoosePass, IsNoLargerThanTheDeadlinesInItAllow) {
  const PromptSpeed speed = Measured();
  const WaitingPrompt hasty = Short(1000, absl::Seconds(2));
  EXPECT_THAT(
      ChoosePass({hasty, Short(3500), Short(100)}, /*head=*/0, 10'000, speed, StepCost(), kNow),
      ElementsAre(0, 2));
  EXPECT_THAT(
      ChoosePass({Short(3500), hasty, Short(100)}, /*head=*/0, 10'000, speed, StepCost(), kNow),
      ElementsAre(0, 2))
      << "one that would come too late with the others waits for the next pass";
}

// Layers that were not measured take as long as they have tokens.
TEST(ChoosePass, LowerClassesMakeAPassNoLongerThanOneAndAHalfTimesItsHead) {
  std::vector<WaitingPrompt> line(6, Short(20));
  line[0] = Short(100);
  const auto chosen = [&] { return ChoosePass(line, 0, 1000, PromptSpeed(), StepCost(), kNow); };
  EXPECT_THAT(chosen(), ElementsAre(0, 1, 2, 3, 4, 5)) << "all are of one class";
  for (WaitingPrompt& prompt : line) prompt.priority = -7;
  line[0].priority = 7;
  EXPECT_THAT(chosen(), ElementsAre(0, 1, 2));
  line[4].priority = 7;
  EXPECT_THAT(chosen(), ElementsAre(0, 1, 4)) << "the class of the head is taken first";
}

}  // namespace
}  // namespace prefilld::server
