#include "server/lane_queue.h"

#include <optional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;

class FakeClock final : public Clock {
 public:
  absl::Time Now() const override { return now; }
  absl::Time now = absl::UnixEpoch();
};

struct FakeTransport final : Transport {
  void Send(Message message, bool last) override {
    if (const auto* frame = std::get_if<KvFrame>(&message)) {
      headers.push_back(frame->header);
      sent.push_back(std::string(1, static_cast<char>(frame->header.layer)));
    } else {
      sent.push_back(std::get<v1::PrefillEvent>(message).accepted().request_id());
    }
  }
  void End(const absl::Status& status) override { ends.push_back(status); }
  void Cancel(const absl::Status& status) override { cancels.push_back(status); }
  std::optional<ConnectionUse> connection_use() const override { return use; }

  std::optional<ConnectionUse> use;  // nullopt: nobody knows

  std::vector<std::string> sent;  // names
  std::vector<wire::FrameHeader> headers;
  std::vector<absl::Status> ends, cancels;
};

Message Frame(char name, size_t payload_bytes = 1) {
  KvFrame frame;
  frame.header.layer = static_cast<uint32_t>(name);
  frame.payload_bytes = payload_bytes;
  return frame;
}

Message Event(const std::string& name) {
  v1::PrefillEvent event;
  event.mutable_accepted()->set_request_id(name);
  return event;
}

using Strings = std::vector<std::string>;

class LaneQueueTest : public ::testing::Test {
 protected:
  FakeClock clock_;
  ComputeProgress progress_;
  LaneQueue queue_{clock_, /*lane=*/3, progress_};
  FakeTransport transport_;
};

TEST_F(LaneQueueTest, SendsInOrderAndOneAtATime) {
  queue_.Push(Frame('a'));
  queue_.Push(Frame('b', 2));
  EXPECT_TRUE(queue_.Attach(&transport_));
  EXPECT_EQ(transport_.sent, Strings({"a"}));
  EXPECT_EQ(queue_.pending_bytes(), 3);
  queue_.OnWriteDone(true);
  EXPECT_EQ(transport_.sent, Strings({"a", "b"}));
  EXPECT_EQ(queue_.pending_bytes(), 2);
  queue_.Close(Event("last"));
  queue_.Push(Event("too late"));
  queue_.OnWriteDone(true);
  EXPECT_TRUE(transport_.ends.empty());
  queue_.OnWriteDone(true);
  EXPECT_EQ(transport_.sent, Strings({"a", "b", "last"}));
  ASSERT_EQ(transport_.ends.size(), 1);
  EXPECT_TRUE(transport_.ends[0].ok());
  EXPECT_EQ(queue_.pending_bytes(), 0);
}

TEST_F(LaneQueueTest, TakesOneTransport) {
  FakeTransport second;
  EXPECT_FALSE(queue_.attached());
  EXPECT_TRUE(queue_.Attach(&transport_));
  EXPECT_TRUE(queue_.attached());
  EXPECT_FALSE(queue_.Attach(&second));
}

TEST_F(LaneQueueTest, StampsAFrameOnlyWhenItsTurnHasCome) {
  progress_.started_at = clock_.now;
  progress_.layers_computed = 1;
  queue_.Push(Frame('a'));
  queue_.Push(Event("between"));
  queue_.Push(Frame('b'));
  clock_.now += absl::Microseconds(5);
  queue_.Attach(&transport_);
  progress_.layers_computed = 2;
  clock_.now += absl::Microseconds(2);
  queue_.OnWriteDone(true);
  queue_.OnWriteDone(true);
  ASSERT_EQ(transport_.sent, Strings({"a", "between", "b"}));
  for (const uint64_t i : {0, 1}) {
    EXPECT_EQ(transport_.headers[i].lane, 3u);
    EXPECT_EQ(transport_.headers[i].sequence, i);
    EXPECT_EQ(transport_.headers[i].sent_at_us, i == 0 ? 5u : 7u);
    EXPECT_EQ(transport_.headers[i].layers_computed, i + 1);
  }
}

TEST_F(LaneQueueTest, AbortBreaksOffTheWriteAndDropsTheRest) {
  queue_.Attach(&transport_);
  queue_.Push(Frame('a'));
  queue_.Push(Frame('b'));
  queue_.Abort(absl::AbortedError("enough"));
  ASSERT_EQ(transport_.cancels.size(), 1);
  EXPECT_TRUE(transport_.ends.empty());  // the write is still the transport's
  queue_.OnWriteDone(false);
  ASSERT_EQ(transport_.ends.size(), 1);
  EXPECT_EQ(transport_.ends[0], absl::AbortedError("enough"));
  EXPECT_EQ(transport_.sent, Strings({"a"}));
  queue_.Abort(absl::CancelledError("again"));
  EXPECT_EQ(transport_.ends.size(), 1);
}

TEST_F(LaneQueueTest, AbortOverridesACloseThatIsNotDone) {
  queue_.Attach(&transport_);
  queue_.Push(Frame('a'));
  queue_.Close();
  queue_.Abort(absl::AbortedError("enough"));
  queue_.OnWriteDone(true);
  ASSERT_EQ(transport_.ends.size(), 1);
  EXPECT_EQ(transport_.ends[0], absl::AbortedError("enough"));
}

TEST_F(LaneQueueTest, AbortedBeforeAttachEndsOnAttach) {
  queue_.Push(Frame('a'));
  queue_.Abort(absl::AbortedError("enough"));
  queue_.Attach(&transport_);
  EXPECT_TRUE(transport_.sent.empty());
  ASSERT_EQ(transport_.ends.size(), 1);
}

TEST_F(LaneQueueTest, AFailedWriteEndsTheStream) {
  queue_.Attach(&transport_);
  queue_.Push(Frame('a'));
  queue_.Push(Frame('b'));
  queue_.OnWriteDone(false);
  EXPECT_EQ(transport_.sent, Strings({"a"}));
  ASSERT_EQ(transport_.ends.size(), 1);
  EXPECT_EQ(transport_.ends[0].code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(queue_.pending_bytes(), 0);
}

TEST_F(LaneQueueTest, StallIsTheAgeOfTheWriteInProgress) {
  queue_.Attach(&transport_);
  clock_.now += absl::Seconds(100);
  EXPECT_EQ(queue_.StalledFor(clock_.now), absl::ZeroDuration());
  queue_.Push(Frame('a'));
  clock_.now += absl::Seconds(3);
  EXPECT_EQ(queue_.StalledFor(clock_.now), absl::Seconds(3));
  EXPECT_FALSE(queue_.idle());
  queue_.OnWriteDone(true);
  EXPECT_EQ(queue_.StalledFor(clock_.now), absl::ZeroDuration());
  EXPECT_TRUE(queue_.idle());
}

TEST_F(LaneQueueTest, AMessageThatLeavesSlowlyIsNotStalled) {
  transport_.use = Transport::ConnectionUse{.bytes_taken = 1000};
  queue_.Push(Frame('a', 2 << 20));
  queue_.Attach(&transport_);
  for (int second = 1; second <= 15; ++second) {
    clock_.now += absl::Seconds(1);
    transport_.use->bytes_taken += 139'000;
    EXPECT_EQ(queue_.StalledFor(clock_.now), absl::ZeroDuration());
  }
  clock_.now += absl::Seconds(5);
  EXPECT_EQ(queue_.StalledFor(clock_.now), absl::Seconds(5));
}

TEST_F(LaneQueueTest, PingsAreNoProgress) {
  transport_.use = Transport::ConnectionUse{};
  queue_.Push(Frame('a', 2 << 20));
  queue_.Attach(&transport_);
  for (int second = 1; second <= 10; ++second) {
    clock_.now += absl::Seconds(1);
    transport_.use->bytes_taken += 17;
    EXPECT_EQ(queue_.StalledFor(clock_.now), absl::Seconds(second));
  }
}

// The other streams of the connection flow, and this one's peer does not read it.
TEST_F(LaneQueueTest, AStreamThatIsPassedByTheOthersOfItsConnectionIsStalled) {
  transport_.use = Transport::ConnectionUse{.bytes_taken = 0, .most_streams = 2};
  queue_.Push(Frame('a', 2 << 20));
  queue_.Attach(&transport_);
  absl::Duration stalled;
  for (int second = 1; second <= 10; ++second) {
    clock_.now += absl::Seconds(1);
    transport_.use->bytes_taken += 10 << 20;
    stalled = queue_.StalledFor(clock_.now);
  }
  EXPECT_EQ(stalled, absl::Seconds(9));
}

// A consumer in shared memory reads frames where they are, so they are kept until it has them.
TEST_F(LaneQueueTest, FramesThatAreKeptHoldUpTheEndAndStallUntilTheyAreAcknowledged) {
  queue_.Attach(&transport_);
  queue_.Push(Frame('a', 10));
  queue_.OnWriteDone(true);
  queue_.KeepUntilAcknowledged();
  queue_.Push(Frame('b', 20));
  queue_.OnWriteDone(true);
  queue_.Close(Event("last"));
  queue_.OnWriteDone(true);
  EXPECT_EQ(transport_.sent, Strings({"a", "b", "last"}));
  EXPECT_TRUE(transport_.ends.empty()) << "its consumer may still be reading";
  EXPECT_EQ(queue_.held_frames().all, 1) << "the first was sent before";
  EXPECT_EQ(queue_.taken(clock_.now).payload_bytes, 10);
  clock_.now += absl::Seconds(31);
  EXPECT_EQ(queue_.StalledFor(clock_.now), absl::Seconds(31));
  EXPECT_TRUE(absl::IsOutOfRange(queue_.Acknowledge(3, {}).status()));
  EXPECT_TRUE(transport_.ends.empty());
  EXPECT_TRUE(queue_.Acknowledge(2, {}).ok());
  EXPECT_EQ(queue_.taken(clock_.now).payload_bytes, 30);
  ASSERT_EQ(transport_.ends.size(), 1);
  EXPECT_TRUE(transport_.ends[0].ok());
}

}  // namespace
}  // namespace prefilld::server
