#include "server/scheduler.h"

#include <gmock/gmock.h>

#include "absl/synchronization/notification.h"
#include "tests/server/job_harness.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::ElementsAre;
using ::testing::StartsWith;

TEST_F(SchedulerTest, ComputesInTheOrderOfArrival) {
  auto first = Submit(2001), second = Submit(2002), third = Submit(2003);
  Run();
  EXPECT_THAT(bench_.engine.lengths(),
              ElementsAre(ElementsAre(2001), ElementsAre(2002), ElementsAre(2003)));
  for (const auto* call : {&first, &second, &third})
    EXPECT_NE((*call)->consumer->result(), nullptr);
}

TEST_F(SchedulerTest, ShortPromptIsBatchedWithTheHead) {
  auto holder = Submit(2000);
  EXPECT_TRUE(scheduler_.StepOnce());
  auto head = Submit(100), long_one = Submit(3000), short_one = Submit(50);
  EXPECT_EQ(scheduler_.state().queued_tokens, 3150);
  Run();
  EXPECT_THAT(bench_.engine.lengths(),
              ElementsAre(ElementsAre(2000), ElementsAre(100, 50), ElementsAre(3000)));
}

TEST_F(SchedulerTest, OneStepIsOneLayer) {
  auto call = Submit(2000);
  EXPECT_TRUE(scheduler_.StepOnce());  // starts the pass
  for (int layer = 1; layer <= 4; ++layer) {
    EXPECT_TRUE(scheduler_.StepOnce());
    EXPECT_EQ(bench_.engine.layers_run(), layer);
    bench_.PackAll();
  }
}

TEST_F(SchedulerTest, IsWokenByARequest) {
  EXPECT_FALSE(scheduler_.StepOnce());
  const int64_t events = bench_.wake.count();
  auto call = Submit(10);
  EXPECT_GT(bench_.wake.count(), events);
}

TEST_F(SchedulerTest, ACancelledRequestStopsAtTheNextLayerAndFreesEverything) {
  auto call = Submit(2000);
  for (int i = 0; i < 3; ++i) scheduler_.StepOnce();
  EXPECT_EQ(bench_.engine.layers_run(), 2);
  call->job->OnCallCancelled();
  EXPECT_EQ(scheduler_.state().running_requests, 0);
  Retire(*call);
  Run();
  EXPECT_EQ(bench_.engine.layers_run(), 2);
  EXPECT_EQ(bench_.engine.alive(), 0);
  EXPECT_EQ(bench_.ring->staged_bytes(), 0);
  EXPECT_TRUE(scheduler_.AwaitIdle(absl::ZeroDuration()));
}

TEST_F(SchedulerTest, ARequestPastItsDeadlineEndsBetweenTwoLayers) {
  auto call = Submit(2000, 2 * kLayerTime);
  Run();
  EXPECT_EQ(bench_.engine.layers_run(), 2);
  EXPECT_EQ(call->job->ending().outcome, Outcome::kDeadline);
  EXPECT_EQ(call->consumer->end()->message(), "the deadline passed after layer 2 of 4");
}

TEST_F(SchedulerTest, ARequestThatEndedInTheQueueIsNotComputed) {
  auto running = Submit(2000), queued = Submit(3000);
  scheduler_.StepOnce();
  queued->job->OnCallCancelled();
  Run();
  EXPECT_THAT(bench_.engine.lengths(), ElementsAre(ElementsAre(2000)));
}

TEST_F(SchedulerTest, AFullQueueRefusesAndSaysWhenToComeBack) {
  auto running = Submit(2000);
  scheduler_.StepOnce();
  std::vector<absl::StatusOr<Call>> queued;
  for (int i = 0; i < 4; ++i) queued.push_back(Submit(2000));
  const auto refused = scheduler_.Submit(bench_.NewJob(2000));
  EXPECT_EQ(refused.status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(refused.retry_after, absl::Seconds(8)) << "8000 tokens wait, 1000 a second unmeasured";
  EXPECT_EQ(scheduler_.state().queued_requests, 4);
  // The place of a request that leaves is free at once.
  queued[1]->job->OnCallCancelled();
  Retire(*queued[1]);
  EXPECT_TRUE(Submit(2000).ok());
}

TEST_F(SchedulerTest, ADeadlineOutOfReachIsRefusedOnceSpeedsAreKnown) {
  for (int i = 0; i < PromptSpeed::kMinSamples; ++i) {
    auto call = Submit(2000, absl::Milliseconds(1100));  // it takes a second
    ASSERT_TRUE(call.ok()) << call.status();
    Run();
    Retire(*call);
  }
  EXPECT_EQ(Submit(20'000, absl::Seconds(4)).status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(Submit(20'000, absl::Seconds(6)).ok());
}

TEST_F(SchedulerTest, AnIdIsTakenUntilTheResultIsOut) {
  auto call = Submit(10, absl::InfiniteDuration(), "twin");
  scheduler_.StepOnce();
  EXPECT_EQ(scheduler_.Find("twin"), call->job);
  EXPECT_EQ(Submit(10, absl::InfiniteDuration(), "twin").status().code(),
            absl::StatusCode::kAlreadyExists);
  Run();
  EXPECT_NE(call->consumer->result(), nullptr);
  auto next = Submit(10, absl::InfiniteDuration(), "twin");
  ASSERT_TRUE(next.ok()) << next.status();
  // The end of the first call takes nothing away from the second request.
  Retire(*call);
  EXPECT_EQ(scheduler_.Find("twin"), next->job);
  Run();
  Retire(*next);
  EXPECT_EQ(scheduler_.Find("twin"), nullptr);
  EXPECT_TRUE(scheduler_.AwaitIdle(absl::ZeroDuration()));
}

TEST_F(SchedulerTest, ADrainTakesNothingNewAndFinishesWhatItHas) {
  auto running = Submit(2000);
  scheduler_.StepOnce();
  auto queued = Submit(3000);
  scheduler_.Close("the server is draining");
  EXPECT_EQ(Submit(10).status(), absl::UnavailableError("the server is draining"));
  EXPECT_FALSE(scheduler_.AwaitIdle(absl::ZeroDuration()));
  Run();
  for (auto* call : {&running, &queued}) {
    EXPECT_NE((*call)->consumer->result(), nullptr);
    Retire(**call);
  }
  EXPECT_TRUE(scheduler_.AwaitIdle(absl::ZeroDuration()));
}

TEST_F(SchedulerTest, AFailureOfTheDeviceEndsEveryRequest) {
  auto running = Submit(2000);
  scheduler_.StepOnce();
  auto queued = Submit(3000);
  bench_.engine.FailFrom(1, absl::InternalError("an illegal memory access"));
  Run();
  EXPECT_EQ(scheduler_.failure(), absl::InternalError("an illegal memory access"));
  for (auto* call : {&running, &queued}) {
    EXPECT_EQ((*call)->job->ending().outcome, Outcome::kDeviceFailed);
    EXPECT_EQ((*call)->consumer->end()->code(), absl::StatusCode::kUnavailable);
  }
  EXPECT_THAT(std::string(Submit(10).status().message()), StartsWith("the device failed: "));
  EXPECT_EQ(bench_.engine.started(), 1);
  EXPECT_EQ(bench_.engine.alive(), 0);
}

TEST_F(SchedulerTest, AFailureToPackIsAFailureOfTheDevice) {
  auto call = Submit(2000);
  bench_.engine.FailPacking(absl::InternalError("copy failed"));
  Run();
  EXPECT_EQ(scheduler_.failure(), absl::InternalError("copy failed"));
  EXPECT_EQ(call->job->ending().outcome, Outcome::kDeviceFailed);
}

// The frame that fails is still being packed when its request has ended and the pass is over.
TEST(Scheduler, AFailureToPackIsNotLostWithTheRequestThatEnded) {
  Bench bench({}, /*num_buffers=*/8, /*pack_threads=*/1);
  Scheduler scheduler(bench.engine, bench.resources, bench.wake,
                      QueueLimits{.capacity = 4, .max_queued_tokens = 100'000});
  absl::Notification packing, ended;
  bench.engine.FailPacking(absl::InternalError("copy failed"));
  bench.engine.set_on_pack([&] {
    packing.Notify();
    ended.WaitForNotification();
    // The pass drops its second layer, which no frame has been packed of, when it is over.
    EXPECT_TRUE(Eventually([&] { return bench.engine.held() == 1; }));
  });
  const auto job = bench.NewJob(10);
  ASSERT_TRUE(scheduler.Submit(job).status.ok());
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(scheduler.StepOnce());  // starts, and computes two layers
  packing.WaitForNotification();
  job->OnCallCancelled();
  ended.Notify();
  EXPECT_TRUE(scheduler.StepOnce());
  EXPECT_EQ(bench.engine.alive(), 0);
  EXPECT_EQ(scheduler.failure(), absl::InternalError("copy failed"));
  scheduler.Retire(*job);
}

TEST_F(SchedulerTest, ABatchThatTheEngineRefusesIsComputedOneByOne) {
  bench_.engine.set_refuses_batches(true);
  auto first = Submit(10), second = Submit(20);
  Run();
  EXPECT_THAT(bench_.engine.lengths(), ElementsAre(ElementsAre(10), ElementsAre(20)));
  EXPECT_NE(first->consumer->result(), nullptr);
  EXPECT_NE(second->consumer->result(), nullptr);
  EXPECT_FALSE(scheduler_.state().work_waits);
}

}  // namespace
}  // namespace prefilld::server
