// Tests what happens at the points inside a layer of a long prompt.
#include <gmock/gmock.h>

#include "server/scheduler.h"
#include "tests/server/job_harness.h"

namespace prefilld::server {
namespace {

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

// It came first for its long wait, which its layer ends.
TEST(Scheduler, APromptThatHadWaitedLetsAShortOneGoFirstInsideItsLayer) {
  Bench bench({.points_per_layer = 8, .interject_tokens = 1000});
  Scheduler scheduler(bench.engine, bench.resources, bench.wake,
                      QueueLimits{.capacity = 8, .max_queued_tokens = 100'000});
  const auto long_one = bench.NewJob(50'000), short_one = bench.NewJob(100);
  Consumer long_consumer(long_one), short_consumer(short_one);
  ASSERT_TRUE(scheduler.Submit(long_one).status.ok());
  bench.clock.Advance(absl::Hours(1));
  bench.engine.set_on_layer([&](int64_t num_tokens) {
    bench.clock.Advance(num_tokens * StepCost::kUnmeasuredPerToken);
    bench.PackAll();
    if (num_tokens == 50'000 && scheduler.Find(short_one->work().id) == nullptr) {
      EXPECT_TRUE(scheduler.Submit(short_one).status.ok());
    }
  });
  for (int i = 0; i < 2; ++i) EXPECT_TRUE(scheduler.StepOnce());  // starts, and computes a layer
  EXPECT_EQ(long_one->record().stats().layers_computed, 1);
  EXPECT_TRUE(short_one->record().stats().first_token_at.has_value());
  do {
    bench.PackAll();
  } while (scheduler.StepOnce());
  for (const auto& job : {long_one, short_one}) scheduler.Retire(*job);
}

// It may not compute there, but needs no device to send its result.
TEST(Scheduler, AResultThatIsDueIsSentInsideALayerOfAnotherPrompt) {
  Bench bench({.kv_slots = 8, .points_per_layer = 2, .interject_tokens = 1000});
  Scheduler scheduler(bench.engine, bench.resources, bench.wake,
                      QueueLimits{.capacity = 8, .max_queued_tokens = 100'000});
  const auto done = bench.NewJob(2000), long_one = bench.NewJob(50'000);
  Consumer consumer(done), long_consumer(long_one);
  ASSERT_TRUE(scheduler.Submit(done).status.ok());
  while (scheduler.StepOnce()) {
  }
  EXPECT_TRUE(done->record().stats().first_token_at.has_value());
  EXPECT_EQ(consumer.result(), nullptr) << "nothing was packed";
  ASSERT_TRUE(scheduler.Submit(long_one).status.ok());
  EXPECT_TRUE(scheduler.StepOnce());  // starts it
  bench.engine.set_on_layer([&](int64_t) { bench.PackAll(); });
  EXPECT_TRUE(scheduler.StepOnce());
  EXPECT_EQ(long_one->record().stats().layers_computed, 1);
  EXPECT_NE(consumer.result(), nullptr);
  EXPECT_EQ(bench.engine.alive(), 1) << "its place is free, too";
  do {
    bench.PackAll();
  } while (scheduler.StepOnce());
  for (const auto& job : {done, long_one}) scheduler.Retire(*job);
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

}  // namespace
}  // namespace prefilld::server
