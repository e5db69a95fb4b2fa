// Tests lanes that outlive their transports.
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "server/lane_queue.h"
#include "tests/server/fake_engine.h"
#include "tests/server/job_harness.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;

// Takes nothing by itself: the test says when a write is done.
struct HeldTransport final : Transport {
  void Send(Message message, bool last) override {
    if (const auto* frame = std::get_if<KvFrame>(&message)) {
      sent.push_back(std::to_string(frame->header.sequence));
    } else {
      const auto& event = std::get<v1::PrefillEvent>(message);
      sent.push_back(event.has_accepted() ? "accepted" : event.has_result() ? "result" : "event");
    }
    under_way = std::move(message);
  }
  void End(const absl::Status& status) override { end = status; }
  void Cancel(const absl::Status&) override { cancelled = true; }

  std::optional<ConnectionUse> connection_use() const override { return use; }

  void Take(LaneQueue& queue, int count = 1) {
    for (int i = 0; i < count; ++i) {
      under_way = Message();
      queue.OnWriteDone(!cancelled);
    }
  }

  std::vector<std::string> sent;
  std::optional<absl::Status> end;
  bool cancelled = false;
  Message under_way;
  std::optional<ConnectionUse> use;
};

using Strings = std::vector<std::string>;

class ResumableLane : public ::testing::Test {
 protected:
  void PushFrames(int count) {
    for (int i = 0; i < count; ++i) {
      KvFrame frame;
      frame.payload =
          std::make_shared<StagingRing::Lease>(ring_->Acquire({credit_}, [] { return false; }));
      frame.payload_bytes = 100;
      queue_.Push(std::move(frame));
    }
  }
  int64_t buffers_on_loan() const { return ring_->staged_bytes() / 4096; }
  static Message Accepted() {
    v1::PrefillEvent event;
    event.mutable_accepted();
    return event;
  }
  static Message Result() {
    v1::PrefillEvent event;
    event.mutable_result();
    return event;
  }

  FakeClock clock_;
  ComputeProgress progress_;
  FakeEngine engine_{FakeEngineOptions()};
  std::unique_ptr<StagingRing> ring_ = *StagingRing::Create(engine_, 32, 4096);
  std::shared_ptr<StagingRing::Credit> credit_ = std::make_shared<StagingRing::Credit>();
  LaneQueue queue_{clock_, /*lane=*/0, progress_, /*resumable=*/true};
  HeldTransport first_, second_, third_;
};

TEST_F(ResumableLane, AFrameHoldsItsBufferUntilItIsBothWrittenAndAcknowledged) {
  queue_.Attach(&first_);
  PushFrames(3);
  first_.Take(queue_, 2);
  EXPECT_EQ(buffers_on_loan(), 3);
  EXPECT_EQ(*queue_.Acknowledge(1, {}), 0);
  EXPECT_EQ(buffers_on_loan(), 2);
  EXPECT_EQ(*queue_.Acknowledge(3, {}), 0);  // the third is still being written
  EXPECT_EQ(buffers_on_loan(), 1);
  first_.Take(queue_);
  EXPECT_EQ(buffers_on_loan(), 0);
  EXPECT_EQ(queue_.held_frames().all, 0);
}

TEST_F(ResumableLane, AStreamInPlaceOfABrokenOneBringsWhatIsNotAcknowledgedAndThenTheRest) {
  queue_.Attach(&first_);
  PushFrames(5);
  first_.Take(queue_, 3);
  ASSERT_TRUE(queue_.Acknowledge(1, {}).ok());
  EXPECT_TRUE(queue_.OnPeerGone(&first_));
  EXPECT_FALSE(first_.end.has_value()) << "the write is still the transport's";
  first_.cancelled = true;
  first_.Take(queue_);
  ASSERT_TRUE(first_.end.has_value());
  clock_.Advance(absl::Seconds(3));
  EXPECT_EQ(queue_.AwayFor(clock_.Now()), absl::Seconds(3));
  EXPECT_EQ(queue_.held_frames().all, 4);

  // Frame 2 had arrived, and its acknowledgement is lost.
  EXPECT_EQ(*queue_.Resume(&second_, 3, Accepted()), 1);
  EXPECT_EQ(queue_.AwayFor(clock_.Now()), absl::ZeroDuration());
  second_.Take(queue_, 3);
  EXPECT_EQ(second_.sent, Strings({"accepted", "3", "4"}));
}

TEST_F(ResumableLane, TheConsumerIsAwayUntilTheNewStreamHasSaidWhereToGoOn) {
  queue_.Attach(&first_);
  PushFrames(5);
  first_.Take(queue_, 3);
  first_.cancelled = true;
  first_.Take(queue_);
  clock_.Advance(absl::Seconds(3));
  ASSERT_TRUE(queue_.Resume(&second_, std::nullopt, Accepted()).ok());
  EXPECT_EQ(second_.sent, Strings({"accepted"}));
  EXPECT_EQ(queue_.AwayFor(clock_.Now()), absl::Seconds(3));
  second_.cancelled = true;  // it breaks before it has said anything
  second_.Take(queue_);
  ASSERT_TRUE(second_.end.has_value());
  clock_.Advance(absl::Seconds(2));
  EXPECT_EQ(queue_.AwayFor(clock_.Now()), absl::Seconds(5));
  ASSERT_TRUE(queue_.Resume(&third_, std::nullopt, Accepted()).ok());
  EXPECT_EQ(*queue_.GoOnFrom(2), 2);
  EXPECT_EQ(queue_.AwayFor(clock_.Now()), absl::ZeroDuration());
  third_.Take(queue_, 3);
  EXPECT_EQ(third_.sent, Strings({"accepted", "2", "3", "4"}));
  EXPECT_EQ(queue_.StalledFor(clock_.Now()), absl::ZeroDuration());
  EXPECT_EQ(queue_.GoOnFrom(1).status().code(), absl::StatusCode::kOutOfRange);
}

TEST_F(ResumableLane, ThatForgoesResumptionKeepsNothing) {
  PushFrames(2);
  ASSERT_TRUE(queue_.Resume(&first_, std::nullopt, Accepted()).ok());
  first_.cancelled = true;
  first_.Take(queue_);
  queue_.ForgoResumption();
  EXPECT_EQ(queue_.AwayFor(clock_.Now()), absl::ZeroDuration());
  ASSERT_TRUE(queue_.Resume(&second_, 0, Accepted()).ok());
  second_.Take(queue_, 3);
  EXPECT_EQ(second_.sent, Strings({"accepted", "0", "1"}));
  EXPECT_EQ(buffers_on_loan(), 0);
  EXPECT_FALSE(queue_.OnPeerGone(&second_));
}

TEST_F(ResumableLane, ASecondStreamTakesThePlaceOfOneThatStillWrites) {
  queue_.Attach(&first_);
  PushFrames(2);
  EXPECT_EQ(*queue_.Resume(&second_, 0, Accepted()), 1);
  EXPECT_TRUE(first_.cancelled);
  EXPECT_TRUE(second_.sent.empty()) << "two transports of one lane at once";
  // A third one comes before the first has let go.
  EXPECT_EQ(*queue_.Resume(&third_, 0, Accepted()), 1);
  ASSERT_TRUE(second_.end.has_value());
  first_.Take(queue_);
  ASSERT_TRUE(first_.end.has_value());
  EXPECT_EQ(first_.end->code(), absl::StatusCode::kAborted);
  third_.Take(queue_, 3);
  EXPECT_EQ(third_.sent, Strings({"accepted", "0", "1"}));
  EXPECT_TRUE(queue_.OnPeerGone(&first_)) << "news of a stream that has ended";
  EXPECT_FALSE(third_.end.has_value());
}

TEST_F(ResumableLane, AStreamThatIsIdleIsReplacedAtOnce) {
  queue_.Attach(&first_);
  ASSERT_TRUE(queue_.Resume(&second_, 0, Accepted()).ok());
  EXPECT_TRUE(first_.end.has_value());
  EXPECT_EQ(second_.sent, Strings({"accepted"}));
}

TEST_F(ResumableLane, ADamagedFrameGoesOnceMoreAndBeforeTheOthers) {
  queue_.Attach(&first_);
  PushFrames(4);
  first_.Take(queue_);
  EXPECT_EQ(*queue_.Acknowledge(0, {0}), 1);
  EXPECT_EQ(*queue_.Acknowledge(0, {0, 7}), 0) << "it waits already, and the other was not sent";
  first_.Take(queue_, 4);
  EXPECT_EQ(first_.sent, Strings({"0", "1", "0", "2", "3"}));
  ASSERT_TRUE(queue_.Acknowledge(2, {}).ok());
  EXPECT_EQ(*queue_.Acknowledge(2, {1}), 0) << "it was acknowledged";
}

// Each copy has been written when the next is asked for.
TEST_F(ResumableLane, AFrameThatIsAlwaysDamagedIsNotSentForEver) {
  queue_.Attach(&first_);
  PushFrames(2);
  first_.Take(queue_, 2);
  for (int copy = 1; copy <= RetainedFrames::kMaxDamagedCopies; ++copy) {
    EXPECT_EQ(*queue_.Acknowledge(0, {0}), 1) << copy;
    first_.Take(queue_);
  }
  EXPECT_EQ(*queue_.Acknowledge(0, {1}), 1) << "each frame is counted by itself";
  const absl::Status refused = queue_.Acknowledge(0, {0}).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kAborted);
  EXPECT_EQ(refused.message(), "damaged: 17 copies of frame 0; at most 16");
}

TEST_F(ResumableLane, EndsWhenEverythingIsAcknowledged) {
  queue_.Attach(&first_);
  PushFrames(2);
  queue_.Close();
  first_.Take(queue_, 2);
  EXPECT_FALSE(first_.end.has_value());
  ASSERT_TRUE(queue_.Acknowledge(2, {}).ok());
  ASSERT_TRUE(first_.end.has_value());
  EXPECT_TRUE(first_.end->ok());
  EXPECT_EQ(queue_.AwayFor(clock_.Now() + absl::Seconds(9)), absl::ZeroDuration())
      << "nobody misses a consumer that has everything";
}

TEST_F(ResumableLane, TheResultIsSentAgainToWhomeverComesBackForIt) {
  queue_.Attach(&first_);
  first_.Take(queue_, 0);
  queue_.Close(Result());
  first_.Take(queue_);
  ASSERT_TRUE(first_.end.has_value());
  EXPECT_TRUE(first_.end->ok());
  clock_.Advance(absl::Seconds(1));
  EXPECT_EQ(queue_.AwayFor(clock_.Now()), absl::Seconds(1));
  for (HeldTransport* transport : {&second_, &third_}) {
    ASSERT_TRUE(queue_.Resume(transport, 0, Accepted()).ok());
    transport->Take(queue_, 2);
    EXPECT_EQ(transport->sent, Strings({"accepted", "result"}));
    ASSERT_TRUE(transport->end.has_value());
    EXPECT_TRUE(transport->end->ok());
  }
}

TEST_F(ResumableLane, AcceptedComesOnceOnEachStream) {
  queue_.Push(Accepted());
  queue_.Attach(&first_);
  EXPECT_EQ(first_.sent, Strings({"accepted"}));
  queue_.OnPeerGone(&first_);
  first_.cancelled = true;
  first_.Take(queue_);
  ASSERT_TRUE(queue_.Resume(&second_, 0, Accepted()).ok());
  PushFrames(1);
  second_.Take(queue_, 2);
  EXPECT_EQ(second_.sent, Strings({"accepted", "0"}));

  LaneQueue fresh(clock_, /*lane=*/0, progress_, /*resumable=*/true);
  fresh.Push(Accepted());  // and is taken before its stream is there
  ASSERT_TRUE(fresh.Resume(&third_, 0, Accepted()).ok());
  third_.Take(fresh);
  EXPECT_EQ(third_.sent, Strings({"accepted"}));
  HeldTransport late;
  EXPECT_FALSE(fresh.Attach(&late));
}

TEST_F(ResumableLane, AConsumerThatAcknowledgesNothingIsStalled) {
  queue_.Attach(&first_);
  PushFrames(2);
  clock_.Advance(absl::Seconds(1));
  first_.Take(queue_, 2);
  clock_.Advance(absl::Seconds(2));
  EXPECT_EQ(queue_.StalledFor(clock_.Now()), absl::Seconds(3));
  ASSERT_TRUE(queue_.Acknowledge(1, {}).ok());
  clock_.Advance(absl::Seconds(1));
  EXPECT_EQ(queue_.StalledFor(clock_.Now()), absl::Seconds(1));
  ASSERT_TRUE(queue_.Acknowledge(2, {}).ok());
  clock_.Advance(absl::Seconds(60));
  EXPECT_EQ(queue_.StalledFor(clock_.Now()), absl::ZeroDuration());
  PushFrames(1);
  first_.Take(queue_);
  EXPECT_EQ(queue_.StalledFor(clock_.Now()), absl::ZeroDuration());
}

TEST_F(ResumableLane, ASlowConnectionThatPassesOnWhatWasWrittenIsNoStall) {
  first_.use = {.bytes_taken = 0, .most_streams = 1};
  queue_.Attach(&first_);
  PushFrames(1);
  first_.Take(queue_);  // into the socket's buffer
  clock_.Advance(absl::Seconds(20));
  first_.use->bytes_taken = LaneQueue::kProgressBytes;
  EXPECT_EQ(queue_.StalledFor(clock_.Now()), absl::ZeroDuration());
  clock_.Advance(absl::Seconds(20));
  EXPECT_EQ(queue_.StalledFor(clock_.Now()), absl::Seconds(20));
}

TEST_F(ResumableLane, AConsumerWhoComesAndGoesAndTakesNothingIsExcusedOnce) {
  queue_.Attach(&first_);
  PushFrames(1);
  first_.Take(queue_);
  clock_.Advance(absl::Seconds(3));
  queue_.OnPeerGone(&first_);
  clock_.Advance(absl::Seconds(9));
  ASSERT_TRUE(queue_.Resume(&second_, 0, Accepted()).ok());
  second_.Take(queue_, 2);
  EXPECT_EQ(queue_.StalledFor(clock_.Now()), absl::Seconds(3));
  queue_.OnPeerGone(&second_);
  clock_.Advance(absl::Seconds(9));
  ASSERT_TRUE(queue_.Resume(&third_, 0, Accepted()).ok());
  third_.Take(queue_, 2);
  EXPECT_EQ(queue_.StalledFor(clock_.Now()), absl::Seconds(12));
}

// Each of its streams takes a greeting and the beginning of a frame.
TEST_F(ResumableLane, AConsumerThatResumesAgainAndAgainIsStalledWhileItIsWrittenTo) {
  std::vector<HeldTransport> streams(8);
  queue_.Attach(&streams[0]);
  PushFrames(2);
  for (size_t i = 1; i < streams.size(); ++i) {
    clock_.Advance(absl::Seconds(5));
    ASSERT_TRUE(queue_.Resume(&streams[i], 0, Accepted()).ok());
    streams[i - 1].Take(queue_);
    streams[i].Take(queue_);
    EXPECT_EQ(streams[i].sent, Strings({"accepted", "0"}));
    EXPECT_EQ(queue_.StalledFor(clock_.Now()), i * absl::Seconds(5));
  }
  ASSERT_TRUE(queue_.Acknowledge(1, {}).ok());
  streams.back().Take(queue_);
  clock_.Advance(absl::Seconds(1));
  EXPECT_EQ(queue_.StalledFor(clock_.Now()), absl::Seconds(1));
}

TEST_F(ResumableLane, TheTimeAwayIsNotTimeInWhichTheConsumerWasSlow) {
  queue_.Attach(&first_);
  PushFrames(2);
  first_.Take(queue_, 2);
  clock_.Advance(absl::Seconds(3));
  queue_.OnPeerGone(&first_);
  clock_.Advance(absl::Seconds(9));
  ASSERT_TRUE(queue_.Resume(&second_, 1, Accepted()).ok());
  second_.Take(queue_, 2);
  EXPECT_EQ(queue_.taken(clock_.Now()).payload_bytes, 100);
  EXPECT_EQ(queue_.taken(clock_.Now()).busy, absl::Seconds(3));
  EXPECT_EQ(queue_.StalledFor(clock_.Now()), absl::ZeroDuration());
}

TEST_F(ResumableLane, ItIsNotEitherWhileTheNewStreamHasNotSaidWhereToGoOn) {
  queue_.Attach(&first_);
  PushFrames(2);
  first_.Take(queue_, 2);
  clock_.Advance(absl::Seconds(3));
  queue_.OnPeerGone(&first_);
  clock_.Advance(absl::Seconds(9));
  ASSERT_TRUE(queue_.Resume(&second_, std::nullopt, Accepted()).ok());
  EXPECT_EQ(queue_.taken(clock_.Now()).busy, absl::ZeroDuration());
  ASSERT_TRUE(queue_.GoOnFrom(0).ok());
  EXPECT_EQ(queue_.taken(clock_.Now()).busy, absl::Seconds(3));
}

TEST_F(ResumableLane, WhatIsAcknowledgedCountsAsTaken) {
  queue_.Attach(&first_);
  PushFrames(2);
  first_.Take(queue_, 2);
  clock_.Advance(absl::Seconds(5));
  EXPECT_EQ(queue_.taken(clock_.Now()).payload_bytes, 0);
  EXPECT_EQ(queue_.taken(clock_.Now()).busy, absl::Seconds(5));
  ASSERT_TRUE(queue_.Acknowledge(2, {}).ok());
  clock_.Advance(absl::Seconds(5));
  EXPECT_EQ(queue_.taken(clock_.Now()).payload_bytes, 200);
  EXPECT_EQ(queue_.taken(clock_.Now()).busy, absl::Seconds(5));
}

TEST_F(ResumableLane, AbortGivesEverythingBackAndLetsNobodyAttach) {
  queue_.Attach(&first_);
  PushFrames(5);
  first_.Take(queue_, 2);
  queue_.OnPeerGone(&first_);
  first_.cancelled = true;
  first_.Take(queue_);
  EXPECT_EQ(buffers_on_loan(), 5);
  queue_.Abort(absl::AbortedError("enough"));
  EXPECT_EQ(buffers_on_loan(), 0);
  EXPECT_EQ(queue_.Resume(&second_, 0, Accepted()).status(), absl::AbortedError("enough"));
  EXPECT_FALSE(second_.end.has_value());
}

TEST_F(ResumableLane, AnAbortReachesAStreamThatWaitsForAnothersPlace) {
  queue_.Attach(&first_);
  PushFrames(1);
  ASSERT_TRUE(queue_.Resume(&second_, 0, std::nullopt).ok());
  queue_.Abort(absl::AbortedError("enough"));
  first_.Take(queue_);
  ASSERT_TRUE(second_.end.has_value());
  EXPECT_EQ(*second_.end, absl::AbortedError("enough"));
  EXPECT_EQ(buffers_on_loan(), 0);
}

TEST_F(ResumableLane, NumbersThatWereNeverSentOrAreGoneAreRefused) {
  queue_.Attach(&first_);
  PushFrames(3);
  first_.Take(queue_, 2);
  EXPECT_EQ(queue_.Acknowledge(4, {}).status().code(), absl::StatusCode::kOutOfRange);
  ASSERT_TRUE(queue_.Acknowledge(2, {}).ok());
  EXPECT_TRUE(queue_.Acknowledge(1, {}).ok()) << "it was overtaken";
  EXPECT_EQ(queue_.Resume(&second_, 1, std::nullopt).status().code(),
            absl::StatusCode::kOutOfRange);
  EXPECT_EQ(queue_.Resume(&second_, 4, std::nullopt).status().code(),
            absl::StatusCode::kOutOfRange);
  EXPECT_TRUE(queue_.Resume(&second_, 2, std::nullopt).ok());
}

TEST_F(ResumableLane, AStreamThatWasNeverAttachedIsNotMissed) {
  EXPECT_FALSE(queue_.OnPeerGone(&first_));
  LaneQueue other(clock_, /*lane=*/0, progress_);
  other.Attach(&second_);
  EXPECT_FALSE(other.OnPeerGone(&second_)) << "the lane cannot be resumed";
}

}  // namespace
}  // namespace prefilld::server
