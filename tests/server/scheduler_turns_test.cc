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

// Layers take as long as was measured, but one of the shorter prompt is slow: the first one, which
// finds algorithms, or another.
void ExpectAShortPromptStaysFirst(int slow_layer) {
  constexpr auto kDense = model::AttentionPolicy::kDense;
  Bench bench(
      {.num_layers = 8, .layer_times = {{kDense, 3000, 375'000}, {kDense, 10'000, 1'250'000}}});
  Scheduler scheduler(bench.engine, bench.resources, bench.wake,
                      QueueLimits{.capacity = 8, .max_queued_tokens = 100'000});
  const auto short_one = bench.NewJob(3000), long_one = bench.NewJob(10'000);
  Consumer short_consumer(short_one), long_consumer(long_one);
  int layers = 0;
  bench.engine.set_on_layer([&](int64_t num_tokens) {
    const bool is_slow = num_tokens == 3000 && layers++ == slow_layer;
    bench.clock.Advance(num_tokens * kLayerTime / 2000 * (is_slow ? 8 : 1));
  });
  ASSERT_TRUE(scheduler.Submit(short_one).status.ok());
  for (int i = 0; i < 2 + slow_layer; ++i) EXPECT_TRUE(scheduler.StepOnce());
  ASSERT_TRUE(scheduler.Submit(long_one).status.ok());
  do {
    bench.PackAll();
  } while (scheduler.StepOnce());
  EXPECT_LE(*short_one->record().stats().first_token_at, *long_one->record().stats().started_at);
  for (const auto& job : {short_one, long_one}) scheduler.Retire(*job);
}

TEST(Scheduler, ASlowFirstLayerMakesNoLongPromptOfAShortOne) { ExpectAShortPromptStaysFirst(0); }

TEST(Scheduler, OneSlowLayerMakesNoLongPromptOfAShortOne) { ExpectAShortPromptStaysFirst(1); }

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

// A layer of the long prompt takes four seconds.
TEST(Scheduler, ALowClassOfLongLayersHasATenthOfTheTime) {
  Bench bench;
  Scheduler scheduler(bench.engine, bench.resources, bench.wake,
                      QueueLimits{.capacity = 8, .max_queued_tokens = 10'000'000});
  bench.engine.set_on_layer([&](int64_t num_tokens) {
    bench.clock.Advance(num_tokens == 1'000'000 ? absl::Seconds(4) : absl::Milliseconds(250));
  });
  PrefillWork low = WorkOf(bench.engine, 1'000'000);
  low.priority = -1;
  std::vector<std::shared_ptr<PrefillJob>> jobs = {
      std::make_shared<PrefillJob>(std::move(low), bench.clock)};
  std::vector<std::unique_ptr<Consumer>> consumers;
  consumers.push_back(std::make_unique<Consumer>(jobs[0]));
  ASSERT_TRUE(scheduler.Submit(jobs[0]).status.ok());
  EXPECT_TRUE(scheduler.StepOnce());
  const absl::Time began = bench.clock.Now();
  while (bench.clock.Now() - began < absl::Seconds(60)) {
    if (scheduler.state().queued_requests == 0) {
      PrefillWork urgent = WorkOf(bench.engine, 2000);
      urgent.priority = 7;
      jobs.push_back(std::make_shared<PrefillJob>(std::move(urgent), bench.clock));
      consumers.push_back(std::make_unique<Consumer>(jobs.back()));
      ASSERT_TRUE(scheduler.Submit(jobs.back()).status.ok());
    }
    bench.PackAll();
    ASSERT_TRUE(scheduler.StepOnce());
  }
  EXPECT_EQ(jobs[0]->record().stats().layers_computed, 2) << "after 5 s, and 40 s later";
  scheduler.AbortAll(Outcome::kShutDown, absl::UnavailableError("the test is over"));
  while (scheduler.StepOnce()) {
  }
  for (const auto& job : jobs) scheduler.Retire(*job);
}

TEST(Scheduler, APassOfALowClassWaitsForItsTurnFromWhenItsConsumerHasTakenSomething) {
  Bench bench;
  Scheduler scheduler(bench.engine, bench.resources, bench.wake,
                      QueueLimits{.capacity = 8, .max_queued_tokens = 100'000});
  bench.engine.set_on_layer(
      [&](int64_t num_tokens) { bench.clock.Advance(num_tokens * kLayerTime / 2000); });
  PrefillWork low = WorkOf(bench.engine, 2000);
  low.priority = -1;
  std::vector<std::shared_ptr<PrefillJob>> jobs = {
      std::make_shared<PrefillJob>(std::move(low), bench.clock)};
  std::vector<std::unique_ptr<Consumer>> consumers;
  consumers.push_back(std::make_unique<Consumer>(jobs[0]));
  ASSERT_TRUE(scheduler.Submit(jobs[0]).status.ok());
  while (scheduler.StepOnce()) {
  }
  const int stalled_after = jobs[0]->record().stats().layers_computed;
  ASSERT_LT(stalled_after, FakeEngineOptions().num_layers) << "its consumer has taken nothing";
  const absl::Time began = bench.clock.Now();
  while (bench.clock.Now() - began < 2 * kClassPatience) {
    if (scheduler.state().queued_requests == 0) {
      PrefillWork urgent = WorkOf(bench.engine, 2000);
      urgent.priority = 7;
      jobs.push_back(std::make_shared<PrefillJob>(std::move(urgent), bench.clock));
      consumers.push_back(std::make_unique<Consumer>(jobs.back()));
      ASSERT_TRUE(scheduler.Submit(jobs.back()).status.ok());
    }
    bench.PackAll();
    ASSERT_TRUE(scheduler.StepOnce());
  }
  EXPECT_GT(jobs[0]->record().stats().layers_computed, stalled_after);
  scheduler.AbortAll(Outcome::kShutDown, absl::UnavailableError("the test is over"));
  while (scheduler.StepOnce()) {
  }
  for (const auto& job : jobs) scheduler.Retire(*job);
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

TEST(Scheduler, PromptsWhoseReceiversAreAwaitedTakeOnePlaceAtATime) {
  Bench bench({.max_sequences = 2});
  Scheduler scheduler(bench.engine, bench.resources, bench.wake,
                      QueueLimits{.capacity = 8, .max_queued_tokens = 100'000});
  const Bench::Shared shared = bench.NewShared(100), alone = bench.NewShared(100);
  const auto other = bench.NewJob(2000);
  Consumer first_consumer(shared.first), alone_consumer(alone.first), other_consumer(other);
  for (const auto& job : {shared.first, alone.first, other}) {
    ASSERT_TRUE(scheduler.Submit(job).status.ok());
  }
  const auto run = [&] {
    do {
      bench.PackAll();
    } while (scheduler.StepOnce());
  };
  run();
  EXPECT_NE(other_consumer.result(), nullptr);
  EXPECT_EQ(bench.engine.started(), 2);
  ASSERT_TRUE(shared.first->Join(shared.other).ok());
  int64_t events = bench.wake.count();
  scheduler.Adopt(shared.other);
  EXPECT_GT(bench.wake.count(), events);
  Consumer second_consumer(shared.other);
  run();
  EXPECT_NE(first_consumer.result(), nullptr);
  EXPECT_NE(second_consumer.result(), nullptr);
  EXPECT_EQ(bench.engine.started(), 3);
  // Nobody comes for the other one.
  bench.clock.Advance(bench.resources.timeouts.receiver_attach + absl::Seconds(1));
  alone.first->CheckTimers(bench.resources.timeouts, 0, /*others_wait=*/false);
  events = bench.wake.count();
  scheduler.AdmitReceivers();
  EXPECT_GT(bench.wake.count(), events);
  run();
  EXPECT_NE(alone_consumer.result(), nullptr);
  for (const auto& job : {shared.first, shared.other, alone.first, other}) scheduler.Retire(*job);
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
