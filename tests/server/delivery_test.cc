#include "server/delivery.h"

#include <memory>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "tests/server/fake_engine.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;

constexpr auto kNever = [] { return false; };

// A transport that takes everything at once.
class FastTransport final : public Transport {
 public:
  explicit FastTransport(LaneQueue* queue) : queue_(queue) {}
  void Send(Message message, bool last) override {
    if (const auto* frame = std::get_if<KvFrame>(&message)) {
      frames.push_back(frame->header);
    } else {
      events.push_back(std::get<v1::PrefillEvent>(message));
    }
    message = Message();  // the buffer goes back before the write is done
    queue_->OnWriteDone(true);
  }
  void End(const absl::Status& status) override { ends.push_back(status); }
  void Cancel(const absl::Status&) override {}

  std::vector<v1::PrefillEvent> events;
  std::vector<wire::FrameHeader> frames;
  std::vector<absl::Status> ends;

 private:
  LaneQueue* const queue_;
};

class DeliveryTest : public ::testing::Test {
 protected:
  int SendFrame(Delivery& delivery) {
    KvFrame frame;
    frame.payload = std::make_shared<StagingRing::Lease>(ring_->Acquire({credit_}, kNever));
    frame.payload_bytes = 100;
    return delivery.SendFrame(std::move(frame));
  }

  FakeEngine engine_{FakeEngineOptions()};
  std::unique_ptr<StagingRing> ring_ = *StagingRing::Create(engine_, 32, 4096);
  std::shared_ptr<StagingRing::Credit> credit_ = std::make_shared<StagingRing::Credit>();
};

TEST_F(DeliveryTest, FramesBeforeAnyStreamIsAttachedWaitOnLaneZero) {
  Delivery delivery(/*num_lanes=*/3, /*pushes=*/false, Clock::Real());
  EXPECT_EQ(SendFrame(delivery), 0);
  EXPECT_EQ(SendFrame(delivery), 0);
  FastTransport control(&delivery.control());
  delivery.control().Attach(&control);
  EXPECT_EQ(control.frames.size(), 2);
}

TEST_F(DeliveryTest, FramesGoToTheAttachedLaneWithTheLeastToDo) {
  Delivery delivery(/*num_lanes=*/3, /*pushes=*/false, Clock::Real());
  FastTransport lane_2(*delivery.side_lane(2));
  (*delivery.side_lane(2))->Attach(&lane_2);
  EXPECT_FALSE(delivery.consumer(absl::InfinitePast()).all_attached);
  EXPECT_EQ(SendFrame(delivery), 2);
  EXPECT_EQ(SendFrame(delivery), 0);  // equal load: in turn
  EXPECT_EQ(SendFrame(delivery), 2);  // lane 0 has no stream yet, so its frame is pending
  EXPECT_EQ(SendFrame(delivery), 2);
  EXPECT_EQ(delivery.sent().frames_per_lane, (std::vector<int64_t>{1, 0, 3}));
  EXPECT_EQ(lane_2.frames[2].sequence, 2);
  EXPECT_EQ(lane_2.frames[2].lane, 2);
}

TEST_F(DeliveryTest, TheResultWaitsForEverySideLane) {
  Delivery delivery(/*num_lanes=*/2, /*pushes=*/false, Clock::Real());
  FastTransport control(&delivery.control()), lane(*delivery.side_lane(1));
  delivery.control().Attach(&control);
  delivery.SendResult(v1::PrefillResult());
  EXPECT_TRUE(control.events.empty());
  (*delivery.side_lane(1))->Attach(&lane);
  ASSERT_EQ(lane.ends.size(), 1);
  EXPECT_TRUE(lane.ends[0].ok());
  delivery.OnSideLaneDone(1);
  ASSERT_EQ(control.events.size(), 1);
  EXPECT_TRUE(control.events[0].has_result());
  EXPECT_EQ(control.ends.size(), 1);
}

TEST_F(DeliveryTest, TheResultOfAPushWaitsForEveryAcknowledgementAndThenForTheReceiver) {
  Delivery delivery(/*num_lanes=*/2, /*pushes=*/true, Clock::Real());
  FastTransport control(&delivery.control());
  FastTransport lane_0(*delivery.side_lane(0)), lane_1(*delivery.side_lane(1));
  delivery.control().Attach(&control);
  (*delivery.side_lane(0))->Attach(&lane_0);
  (*delivery.side_lane(1))->Attach(&lane_1);
  for (int i = 0; i < 2; ++i) SendFrame(delivery);
  delivery.SendResult(v1::PrefillResult());
  v1::ReceiveReceipt receipt;
  receipt.set_received(1);
  ASSERT_TRUE(delivery.AcknowledgePush(1, receipt, /*goes_on=*/false).ok());
  EXPECT_FALSE(delivery.result_was_pushed());
  ASSERT_TRUE(delivery.AcknowledgePush(0, receipt, /*goes_on=*/false).ok());
  EXPECT_TRUE(delivery.result_was_pushed());
  ASSERT_EQ(lane_0.events.size(), 1);
  EXPECT_TRUE(lane_0.events[0].has_result());
  EXPECT_TRUE(control.events.empty());
  EXPECT_TRUE(lane_1.ends.empty());
  delivery.OnSideLaneDone(0);
  EXPECT_EQ(lane_1.ends.size(), 1);
  ASSERT_EQ(control.events.size(), 1);
  EXPECT_TRUE(control.events[0].has_result());
  // A receiver that has everything is not missed.
  EXPECT_EQ(delivery.consumer(absl::Now() + absl::Hours(1)).receiver_away, absl::ZeroDuration());
}

TEST_F(DeliveryTest, NobodyButTheServerResumesTheLanesOfAPush) {
  Delivery push(/*num_lanes=*/2, /*pushes=*/true, Clock::Real(), /*resumable=*/true);
  EXPECT_TRUE(push.any_lane(0).ok());
  EXPECT_FALSE(push.any_lane(1).ok());
}

TEST_F(DeliveryTest, LaneZeroOfAPullAndUnknownLanesCannotBeAttached) {
  Delivery pull(/*num_lanes=*/2, /*pushes=*/false, Clock::Real());
  EXPECT_FALSE(pull.side_lane(0).ok());
  EXPECT_FALSE(pull.side_lane(2).ok());
  Delivery push(/*num_lanes=*/1, /*pushes=*/true, Clock::Real());
  EXPECT_TRUE(push.side_lane(0).ok());
}

}  // namespace
}  // namespace prefilld::server
