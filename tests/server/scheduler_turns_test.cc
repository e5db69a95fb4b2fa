// Tests how passes share the device and the places of the engine.
#include <gmock/gmock.h>

#include "server/scheduler.h"
#include "tests/server/job_harness.h"

namespace prefilld::server {
namespace {

using ::testing::ElementsAre;

class SchedulerWithPrefixes : public SchedulerTest {
 protected:
  SchedulerWithPrefixes() : SchedulerTest({.cached_tokens = 9000}) {}
};

// Only 1000 of the 10,000 tokens are computed.
TEST_F(SchedulerWithPrefixes, APromptThatIsMostlyCachedCountsAsShort) {
  auto holder = Submit(20'000);
  EXPECT_TRUE(scheduler_.StepOnce());
  auto short_one = Submit(2000), cached = Submit(10'000);
  Run();
  EXPECT_THAT(bench_.engine.lengths(),
              ElementsAre(ElementsAre(20'000), ElementsAre(10'000), ElementsAre(2000)));
  EXPECT_EQ(cached->consumer->result()->cached_tokens(), 9000);
}

// In 4 layers 2000 dense tokens take 16 s, and 2000 that share 4 s.
class SchedulerThatMeasured : public SchedulerTest {
 protected:
  SchedulerThatMeasured()
      : SchedulerTest({.layer_times = {{model::AttentionPolicy::kDense, 2000, 4e6},
                                       {model::AttentionPolicy::kShare, 2000, 1e6}}}) {}
};

TEST_F(SchedulerThatMeasured, OrdersTheFirstPromptsByTheirTime) {
  auto dense = Submit(2000);
  PrefillWork work = WorkOf(bench_.engine, 3000);
  work.attention.policy = model::AttentionPolicy::kShare;
  auto shares = Submit(std::move(work));
  Run();
  EXPECT_THAT(bench_.engine.lengths(), ElementsAre(ElementsAre(3000), ElementsAre(2000)));
}

TEST_F(SchedulerThatMeasured, RefusesAFirstPromptWhoseDeadlineIsOutOfReach) {
  EXPECT_EQ(Submit(2000, absl::Seconds(7)).status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(Submit(2000, absl::Seconds(9)).ok()) << "half of the time may be an error";
}

// The fake engine has places for four prompts.
TEST_F(SchedulerTest, ConsumersThatTakeNothingTimeOutBesideEachOther) {
  std::vector<absl::StatusOr<Call>> stalled;
  for (int i = 0; i < 4; ++i) {
    stalled.push_back(Submit(2000));
    stalled.back()->consumer->HoldStill();
    Run();
  }
  auto next = Submit(100);
  Run();
  EXPECT_EQ(next->consumer->result(), nullptr) << "every place is taken";
  bench_.clock.Advance(bench_.resources.timeouts.stall + absl::Seconds(1));
  Run();
  for (auto& call : stalled) EXPECT_EQ(call->job->ending().outcome, Outcome::kStalled);
  EXPECT_NE(next->consumer->result(), nullptr) << "after one stall time-out, not four";
}

TEST_F(SchedulerTest, AShortPromptIsComputedBetweenTwoLayersOfALongOne) {
  auto long_one = Submit(50'000);
  for (int i = 0; i < 2; ++i) EXPECT_TRUE(scheduler_.StepOnce());  // starts, and computes a layer
  auto short_one = Submit(2000);
  while (short_one->consumer->result() == nullptr) {
    bench_.PackAll();
    ASSERT_TRUE(scheduler_.StepOnce());
  }
  EXPECT_EQ(long_one->job->record().stats().layers_computed, 1);
  EXPECT_EQ(long_one->consumer->result(), nullptr);
  Run();
  EXPECT_NE(long_one->consumer->result(), nullptr);
}

TEST(Scheduler, AShortPromptIsComputedAtThePointsInsideALayer) {
  Bench bench({.points_per_layer = 8, .interject_tokens = 1000});
  Scheduler scheduler(bench.engine, bench.resources, bench.wake,
                      QueueLimits{.capacity = 8, .max_queued_tokens = 100'000});
  const auto long_one = bench.NewJob(50'000), short_one = bench.NewJob(100);
  const auto another_long_one = bench.NewJob(1001);
  Consumer long_consumer(long_one), short_consumer(short_one), other_consumer(another_long_one);
  ASSERT_TRUE(scheduler.Submit(long_one).status.ok());
  bench.engine.set_on_layer([&](int64_t num_tokens) {
    bench.clock.Advance(num_tokens * StepCost::kUnmeasuredPerToken);
    bench.PackAll();
    if (num_tokens == 50'000 && scheduler.Find(short_one->work().id) == nullptr) {
      EXPECT_TRUE(scheduler.Submit(short_one).status.ok());
      EXPECT_TRUE(scheduler.Submit(another_long_one).status.ok());
    }
  });
  for (int i = 0; i < 2; ++i) EXPECT_TRUE(scheduler.StepOnce());  // starts, and computes a layer
  EXPECT_EQ(long_one->record().stats().layers_computed, 1);
  EXPECT_TRUE(short_one->record().stats().first_token_at.has_value());
  EXPECT_FALSE(another_long_one->record().stats().started_at.has_value());
  do {
    bench.PackAll();
  } while (scheduler.StepOnce());
  for (const Consumer* consumer : {&long_consumer, &short_consumer, &other_consumer}) {
    EXPECT_NE(consumer->result(), nullptr);
  }
  for (const auto& job : {long_one, short_one, another_long_one}) scheduler.Retire(*job);
}

// Under turns the short one would go first, inside a layer of the long one already.
TEST(Scheduler, FifoComputesWhoeverCameFirstToTheEnd) {
  Bench bench({.points_per_layer = 8, .interject_tokens = 1000});
  Scheduler scheduler(bench.engine, bench.resources, bench.wake,
                      QueueLimits{.capacity = 8, .max_queued_tokens = 100'000}, Scheduling::kFifo);
  std::vector<int64_t> computed;  // layers, by their tokens
  const auto long_one = bench.NewJob(50'000), short_one = bench.NewJob(100);
  Consumer long_consumer(long_one), short_consumer(short_one);
  ASSERT_TRUE(scheduler.Submit(long_one).status.ok());
  bench.engine.set_on_layer([&](int64_t num_tokens) {
    bench.clock.Advance(num_tokens * StepCost::kUnmeasuredPerToken);
    bench.PackAll();
    computed.push_back(num_tokens);
    if (computed.size() == 1) {
      EXPECT_TRUE(scheduler.Submit(short_one).status.ok());
    }
  });
  do {
    bench.PackAll();
  } while (scheduler.StepOnce());
  EXPECT_THAT(computed, ElementsAre(50'000, 50'000, 50'000, 50'000, 100, 100, 100, 100));
  EXPECT_NE(short_consumer.result(), nullptr);
  for (const auto& job : {long_one, short_one}) scheduler.Retire(*job);
}

// One that may not interject waits for the end of the layer, so the flood must not delay that.
void ExpectAFloodHoldsALayerUp(absl::Duration layer, absl::Duration least, absl::Duration most) {
  Bench bench({.points_per_layer = 8, .interject_tokens = 1000});
  Scheduler scheduler(bench.engine, bench.resources, bench.wake,
                      QueueLimits{.capacity = 8, .max_queued_tokens = 100'000'000});
  const auto long_one = bench.NewJob(1'000'000), other = bench.NewJob(1001);
  Consumer long_consumer(long_one), other_consumer(other);
  std::vector<std::shared_ptr<PrefillJob>> shorts;
  std::vector<std::unique_ptr<Consumer>> consumers;
  ASSERT_TRUE(scheduler.Submit(long_one).status.ok());
  bench.engine.set_on_layer([&](int64_t num_tokens) {
    bench.clock.Advance(num_tokens == 1'000'000 ? layer : absl::Milliseconds(5));
    bench.PackAll();
    if (num_tokens == 1'000'000) {
      EXPECT_TRUE(scheduler.Submit(other).status.ok());
    }
    if (scheduler.state().queued_requests > 1) return;  // there is always a short one
    shorts.push_back(bench.NewJob(100));
    consumers.push_back(std::make_unique<Consumer>(shorts.back()));
    EXPECT_TRUE(scheduler.Submit(shorts.back()).status.ok());
  });
  EXPECT_TRUE(scheduler.StepOnce());  // starts the long one
  const absl::Time start = bench.clock.Now();
  EXPECT_TRUE(scheduler.StepOnce());  // a layer of it
  EXPECT_GE(bench.clock.Now() - start, layer + least);
  EXPECT_LE(bench.clock.Now() - start, layer + most + absl::Milliseconds(10));
  bench.engine.set_on_layer(nullptr);
  scheduler.AbortAll(Outcome::kShutDown, absl::UnavailableError("the test is over"));
  while (scheduler.StepOnce()) {
  }
  shorts.push_back(long_one);
  shorts.push_back(other);
  for (const auto& job : shorts) scheduler.Retire(*job);
}

TEST(Scheduler, AFloodInsideALayerHoldsItUpForHalfASecond) {
  ExpectAFloodHoldsALayerUp(absl::Milliseconds(300), absl::Milliseconds(500),
                            absl::Milliseconds(500));
}

TEST(Scheduler, AFloodInsideALongLayerHasHalfOfTheTime) {
  ExpectAFloodHoldsALayerUp(absl::Seconds(4), absl::Milliseconds(3500), absl::Seconds(4));
}

TEST(Scheduler, ACancelledRequestStopsInsideItsLayer) {
  Bench bench({.points_per_layer = 8});
  Scheduler scheduler(bench.engine, bench.resources, bench.wake,
                      QueueLimits{.capacity = 8, .max_queued_tokens = 100'000});
  const auto job = bench.NewJob(50'000);
  Consumer consumer(job);
  ASSERT_TRUE(scheduler.Submit(job).status.ok());
  bench.engine.set_on_layer([&](int64_t) { job->OnCallCancelled(); });
  while (scheduler.StepOnce()) {
  }
  EXPECT_EQ(bench.engine.layers_run(), 0) << "none was finished";
  EXPECT_EQ(bench.engine.alive(), 0);
  EXPECT_TRUE(scheduler.failure().ok());
  scheduler.Retire(*job);
}

class SchedulerWithLogprobs : public SchedulerTest {
 protected:
  // Submits a prompt whose layers, and parts of log-probabilities, take 6.25 seconds each.
  absl::StatusOr<Call> SubmitGraded(absl::Duration deadline = absl::InfiniteDuration()) {
    PrefillWork work = WorkOf(bench_.engine, 50'000);
    work.prompt_logprobs = true;
    work.deadline = bench_.clock.Now() + deadline;
    return Submit(std::move(work));
  }
  void RunToFirstPart() {
    while (bench_.engine.logprobs_parts() == 0) {
      bench_.PackAll();
      ASSERT_TRUE(scheduler_.StepOnce());
    }
  }
};

TEST_F(SchedulerWithLogprobs, AShortPromptIsComputedBetweenTwoParts) {
  auto graded = SubmitGraded();
  RunToFirstPart();
  auto short_one = Submit(2000);
  while (short_one->consumer->result() == nullptr) {
    bench_.PackAll();
    ASSERT_TRUE(scheduler_.StepOnce());
  }
  EXPECT_EQ(bench_.engine.logprobs_parts(), 1);
  EXPECT_EQ(graded->consumer->result(), nullptr);
  Run();
  ASSERT_NE(graded->consumer->result(), nullptr);
  EXPECT_EQ(graded->consumer->result()->prompt_logprobs_size(), 49'999);
  EXPECT_EQ(graded->consumer->result()->logprobs_us(), 25'000'000u) << "without the short one's";
}

TEST_F(SchedulerWithLogprobs, ADeadlineEndsThemAfterAPart) {
  auto graded = SubmitGraded(absl::Seconds(4 * 6.25 + 6));
  Run();
  EXPECT_EQ(bench_.engine.logprobs_parts(), 1);
  EXPECT_EQ(graded->job->ending().outcome, Outcome::kDeadline);
  EXPECT_EQ(bench_.engine.alive(), 0);
}

TEST_F(SchedulerWithLogprobs, ACancellationEndsThemAfterAPart) {
  auto graded = SubmitGraded();
  RunToFirstPart();
  graded->job->OnCallCancelled();
  Run();
  EXPECT_EQ(bench_.engine.logprobs_parts(), 1);
  EXPECT_EQ(bench_.engine.alive(), 0);
}

TEST_F(SchedulerTest, ALongPromptGoesOnUnderAFloodOfShortOnes) {
  auto long_one = Submit(50'000);
  scheduler_.StepOnce();
  // There is always a short prompt that could go first.
  int shorts = 0;
  std::vector<absl::StatusOr<Call>> calls;
  while (long_one->consumer->result() == nullptr && shorts < 1000) {
    if (scheduler_.state().queued_requests == 0) {
      calls.push_back(Submit(2000));
      ++shorts;
    }
    bench_.PackAll();
    scheduler_.StepOnce();
  }
  EXPECT_NE(long_one->consumer->result(), nullptr);
  EXPECT_GT(shorts, 4) << "they went first, most of the time";
  Run();
}

TEST_F(SchedulerTest, ALongPromptThatIsStartedAtLastComputesAtOnce) {
  auto long_one = Submit(50'000);
  bench_.clock.Advance(absl::Hours(1));
  auto short_one = Submit(2000);
  for (int i = 0; i < 2; ++i) EXPECT_TRUE(scheduler_.StepOnce());  // starts, and computes a layer
  EXPECT_EQ(long_one->job->record().stats().layers_computed, 1);
  EXPECT_FALSE(short_one->job->record().stats().started_at.has_value());
  Run();
}

TEST_F(SchedulerTest, PromptsOfOneLengthDoNotAlternate) {
  auto first = Submit(20'000), second = Submit(20'000);
  Run();
  EXPECT_LE(*first->job->record().stats().first_token_at,
            *second->job->record().stats().started_at);
}

TEST_F(SchedulerTest, AStalledConsumerEndsItsRequestAndHoldsUpNobody) {
  auto stalled = Submit(2000);
  stalled->consumer->HoldStill();
  auto next = Submit(2000);
  Run();
  EXPECT_NE(next->consumer->result(), nullptr);
  EXPECT_EQ(scheduler_.state().running_requests, 1);
  EXPECT_LT(stalled->job->record().stats().layers_computed, 4);
  bench_.clock.Advance(bench_.resources.timeouts.stall + absl::Seconds(1));
  Run();
  EXPECT_EQ(stalled->job->ending().outcome, Outcome::kStalled);
  EXPECT_EQ(bench_.engine.alive(), 0);
}

TEST(Scheduler, APromptWaitsForAPlaceInTheEngine) {
  Bench bench({.max_sequences = 1});
  Scheduler scheduler(bench.engine, bench.resources, bench.wake,
                      QueueLimits{.capacity = 8, .max_queued_tokens = 100'000});
  const auto first = bench.NewJob(3000), second = bench.NewJob(10);
  ASSERT_TRUE(scheduler.Submit(first).status.ok());
  Consumer first_consumer(first);
  for (int i = 0; i < 2; ++i) EXPECT_TRUE(scheduler.StepOnce());  // starts, and computes a layer
  ASSERT_TRUE(scheduler.Submit(second).status.ok());
  Consumer second_consumer(second);
  while (first_consumer.result() == nullptr) {
    EXPECT_EQ(scheduler.state().queued_requests, 1);
    bench.PackAll();
    ASSERT_TRUE(scheduler.StepOnce());
  }
  while (scheduler.StepOnce()) bench.PackAll();
  EXPECT_NE(second_consumer.result(), nullptr);
  EXPECT_TRUE(scheduler.failure().ok());
  for (const auto& job : {first, second}) scheduler.Retire(*job);
}

TEST(Scheduler, TellsWhoWaitsForWhom) {
  Bench bench({.max_sequences = 1});
  Scheduler scheduler(bench.engine, bench.resources, bench.wake,
                      QueueLimits{.capacity = 8, .max_queued_tokens = 100'000});
  const auto running = bench.NewJob(2000), queued = bench.NewJob(3000);
  ASSERT_TRUE(scheduler.Submit(running).status.ok());
  Consumer running_consumer(running);
  scheduler.StepOnce();
  for (const LiveJob& live : scheduler.LiveJobs()) EXPECT_FALSE(live.others_wait);
  ASSERT_TRUE(scheduler.Submit(queued).status.ok());
  scheduler.StepOnce();
  for (const LiveJob& live : scheduler.LiveJobs()) {
    EXPECT_EQ(live.others_wait, live.job == running);
    EXPECT_EQ(live.requests_ahead, live.job == queued ? 1 : 0);
  }
  scheduler.AbortAll(Outcome::kShutDown, absl::UnavailableError("the test is over"));
  while (scheduler.StepOnce()) {
  }
  for (const auto& job : {running, queued}) scheduler.Retire(*job);
}

TEST_F(SchedulerTest, NobodyWaitsForAPassWhileThereIsRoomForAnother) {
  auto running = Submit(2000);
  scheduler_.StepOnce();
  auto queued = Submit(3000);
  scheduler_.StepOnce();
  for (const LiveJob& live : scheduler_.LiveJobs()) EXPECT_FALSE(live.others_wait);
}

}  // namespace
}  // namespace prefilld::server
