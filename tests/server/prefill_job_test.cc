#include "server/prefill_job.h"

#include <gmock/gmock.h>

#include "tests/server/job_harness.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

class PrefillJobTest : public ::testing::Test {
 protected:
  std::shared_ptr<PrefillJob> NewJob(absl::Duration deadline = absl::InfiniteDuration(),
                                     int num_lanes = 1) {
    PrefillWork work = WorkOf(bench_.engine, 100);
    work.deadline = bench_.clock.Now() + deadline;
    work.num_lanes = num_lanes;
    return std::make_shared<PrefillJob>(std::move(work), bench_.clock);
  }
  void CheckTimers(PrefillJob& job, bool others_wait = false) {
    job.CheckTimers(bench_.resources.timeouts, /*queue_position=*/3, others_wait);
  }
  void SendFrame(PrefillJob& job) {
    auto credit = std::make_shared<StagingRing::Credit>();
    KvFrame frame;
    frame.payload =
        std::make_shared<StagingRing::Lease>(bench_.ring->Acquire({credit}, [] { return true; }));
    frame.payload_bytes = bench_.ring->buffer_bytes();
    job.delivery().SendFrame(std::move(frame));
  }
  const JobTimeouts& timeouts() const { return bench_.resources.timeouts; }

  Bench bench_;
};

TEST_F(PrefillJobTest, EndsOnceForTheFirstReason) {
  const auto job = NewJob();
  Consumer consumer(job);
  job->Abort(Outcome::kStalled, absl::AbortedError("first"));
  job->Abort(Outcome::kCancelled, absl::CancelledError("second"));
  EXPECT_TRUE(job->ended());
  EXPECT_EQ(job->ending().outcome, Outcome::kStalled);
  EXPECT_EQ(*consumer.end(), absl::AbortedError("first"));
}

TEST_F(PrefillJobTest, IsNotCancelledOnceItsResultWasSent) {
  const auto job = NewJob();
  Consumer consumer(job);
  job->Start(model::AttentionPolicy::kDense, 1, /*cached_tokens=*/0);
  job->Finish(*job);
  EXPECT_TRUE(job->ended());
  job->OnCallCancelled();
  EXPECT_EQ(job->ending().outcome, Outcome::kOk);
  EXPECT_EQ(*consumer.end(), absl::OkStatus());
}

TEST_F(PrefillJobTest, ACancelAtTheDeadlineIsTheDeadline) {
  const auto early = NewJob(absl::Seconds(1)), late = NewJob(absl::Seconds(1));
  early->OnCallCancelled();
  EXPECT_EQ(early->ending().outcome, Outcome::kCancelled);
  bench_.clock.Advance(absl::Milliseconds(960));  // gRPC's clock may be a little ahead
  late->OnCallCancelled();
  EXPECT_EQ(late->ending().outcome, Outcome::kDeadline);
}

TEST_F(PrefillJobTest, EndsAtItsDeadlineInTheQueue) {
  const auto job = NewJob(absl::Seconds(1));
  CheckTimers(*job);
  EXPECT_FALSE(job->ended());
  bench_.clock.Advance(absl::Seconds(1));
  CheckTimers(*job);
  EXPECT_EQ(job->ending().status,
            absl::DeadlineExceededError("the deadline passed before the first layer"));
}

TEST_F(PrefillJobTest, EndsWhenItsConsumerTakesNothing) {
  const auto job = NewJob();
  Consumer consumer(job);
  consumer.HoldStill();
  bench_.clock.Advance(2 * timeouts().stall);
  CheckTimers(*job);
  EXPECT_FALSE(job->ended()) << "there was nothing to take";
  SendFrame(*job);
  bench_.clock.Advance(timeouts().stall);
  CheckTimers(*job);
  EXPECT_FALSE(job->ended());
  bench_.clock.Advance(absl::Milliseconds(1));
  CheckTimers(*job);
  EXPECT_EQ(job->ending().outcome, Outcome::kStalled);
  EXPECT_THAT(std::string(job->ending().status.message()), HasSubstr("took nothing for 30s"));
  consumer.TakeOne();
}

TEST_F(PrefillJobTest, EndsWhenALaneIsMissing) {
  const auto job = NewJob(absl::InfiniteDuration(), /*num_lanes=*/2);
  Consumer control(job);
  bench_.clock.Advance(timeouts().lane_attach);
  CheckTimers(*job);
  EXPECT_FALSE(job->ended());
  bench_.clock.Advance(absl::Milliseconds(1));
  CheckTimers(*job);
  EXPECT_EQ(job->ending().outcome, Outcome::kLanesMissing);
}

TEST_F(PrefillJobTest, ASlowConsumerIsBorneUnlessOthersWait) {
  const auto job = NewJob();
  Consumer consumer(job);
  consumer.HoldStill();
  for (int i = 0; i < 5; ++i) {
    SendFrame(*job);
    bench_.clock.Advance(absl::Seconds(10));
    consumer.TakeOne();
  }
  CheckTimers(*job);
  EXPECT_FALSE(job->ended());
  CheckTimers(*job, /*others_wait=*/true);
  EXPECT_EQ(job->ending().outcome, Outcome::kTooSlow);
  EXPECT_THAT(std::string(job->ending().status.message()),
              HasSubstr("and others wait; at least 50 MB/s after 30s"));
}

TEST_F(PrefillJobTest, ASlowReceiverEndsWhileAnotherGoesOn) {
  const auto [first, other] = bench_.NewShared(100);
  ASSERT_TRUE(first->Join(other).ok());
  Consumer to_first(first), to_other(other);
  first->Start(model::AttentionPolicy::kDense, 1, /*cached_tokens=*/0);
  to_other.HoldStill();
  for (int i = 0; i < 5; ++i) {
    SendFrame(*other);
    bench_.clock.Advance(absl::Seconds(10));
    to_other.TakeOne();
  }
  CheckTimers(*first);
  EXPECT_FALSE(first->ended());
  CheckTimers(*other);
  EXPECT_EQ(other->ending().outcome, Outcome::kTooSlow);
  EXPECT_FALSE(first->ended());
}

TEST_F(PrefillJobTest, ASlowFirstCallEndsAloneOnceItIsComputed) {
  for (const bool starts : {true, false}) {
    const auto [first, other] = bench_.NewShared(100);
    ASSERT_TRUE(first->Join(other).ok());
    if (starts) first->Start(model::AttentionPolicy::kDense, 1, /*cached_tokens=*/0);
    first->Abort(Outcome::kStalled, absl::AbortedError("took nothing"));
    EXPECT_EQ(other->ended(), !starts);
    EXPECT_EQ(first->wanted(), starts);
    other->Abort(Outcome::kCancelled, absl::CancelledError("enough"));
    EXPECT_FALSE(first->wanted());
  }
}

TEST_F(PrefillJobTest, AwaitsReceiversForALimitedTime) {
  const auto [first, other] = bench_.NewShared(100);
  bench_.clock.Advance(timeouts().receiver_attach);
  CheckTimers(*first);
  EXPECT_TRUE(first->others().awaited);
  bench_.clock.Advance(absl::Milliseconds(1));
  CheckTimers(*first);
  EXPECT_FALSE(first->others().awaited);
  EXPECT_EQ(first->Join(other).code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(first->ended());
}

TEST_F(PrefillJobTest, TellsAReceiverThatComesLateHowFarItIs) {
  const auto [first, other] = bench_.NewShared(100);
  first->Start(model::AttentionPolicy::kDense, 1, /*cached_tokens=*/0);
  first->RecordLayer({});
  bench_.clock.Advance(absl::Seconds(1));
  ASSERT_TRUE(first->Join(other).ok());
  Consumer consumer(other);
  SendFrame(*other);
  ASSERT_EQ(consumer.frames().size(), 1u);
  EXPECT_EQ(consumer.frames()[0].layers_computed(), 1u);
  EXPECT_EQ(consumer.frames()[0].sent_at_us(), 1'000'000u);
  first->RecordLayer({});
  EXPECT_EQ(consumer.num_progress(), 1);
  EXPECT_EQ(other->record().stats().layers_computed, 2);
  first->Finish(*other);
  ASSERT_NE(consumer.result(), nullptr);
  EXPECT_EQ(consumer.result()->num_tokens(), 100u);
  EXPECT_EQ(consumer.result()->kv_frames(), 1u);
  EXPECT_FALSE(first->ended());
}

TEST_F(PrefillJobTest, SendsProgressAfterALongSilence) {
  const auto job = NewJob();
  Consumer consumer(job);
  bench_.clock.Advance(timeouts().heartbeat);
  CheckTimers(*job);
  EXPECT_EQ(consumer.num_progress(), 0);
  bench_.clock.Advance(absl::Milliseconds(1));
  CheckTimers(*job);
  EXPECT_EQ(consumer.num_progress(), 1);
  CheckTimers(*job);
  EXPECT_EQ(consumer.num_progress(), 1);
}

TEST_F(PrefillJobTest, OpensTheCallToItsReceiverWhenItStarts) {
  PrefillWork work = WorkOf(bench_.engine, 100);
  work.deliver_to.set_address("decode:1");
  std::vector<std::shared_ptr<PrefillJob>> dialed;
  const auto job = std::make_shared<PrefillJob>(
      std::move(work), bench_.clock, [&](auto self) { dialed.push_back(std::move(self)); });
  EXPECT_TRUE(dialed.empty());
  job->Start(model::AttentionPolicy::kDense, 1, /*cached_tokens=*/0);
  ASSERT_EQ(dialed.size(), 1u);
  EXPECT_EQ(dialed[0], job);
}

}  // namespace
}  // namespace prefilld::server
