#include "server/lane_queue.h"

#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace prefilld::server {
namespace {

class FakeClock final : public Clock {
 public:
  absl::Time Now() const override { return now; }
  absl::Time now = absl::UnixEpoch();
};

struct FakeTransport final : LaneQueue::Transport {
  void Send(const grpc::ByteBuffer& message, bool last) override {
    grpc::Slice slice;
    EXPECT_TRUE(message.DumpToSingleSlice(&slice).ok());
    sent.emplace_back(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  void End(const absl::Status& status) override { ends.push_back(status); }
  void Cancel(const absl::Status& status) override { cancels.push_back(status); }

  std::vector<std::string> sent;
  std::vector<absl::Status> ends, cancels;
};

LaneQueue::MakeMessage Message(const std::string& text) {
  return [text] {
    const grpc::Slice slice(text);
    return grpc::ByteBuffer(&slice, 1);
  };
}

using Strings = std::vector<std::string>;

class LaneQueueTest : public ::testing::Test {
 protected:
  FakeClock clock_;
  LaneQueue queue_{clock_};
  FakeTransport transport_;
};

TEST_F(LaneQueueTest, SendsInOrderAndOneAtATime) {
  queue_.Push(1, Message("a"));
  queue_.Push(2, Message("b"));
  EXPECT_TRUE(queue_.Attach(&transport_));
  EXPECT_EQ(transport_.sent, Strings({"a"}));
  EXPECT_EQ(queue_.pending_bytes(), 3);
  queue_.OnWriteDone(true);
  EXPECT_EQ(transport_.sent, Strings({"a", "b"}));
  EXPECT_EQ(queue_.pending_bytes(), 2);
  queue_.Close(Message("last"));
  queue_.Push(1, Message("too late"));
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

TEST_F(LaneQueueTest, MakesAMessageOnlyWhenItsTurnHasCome) {
  int made = 0;
  const auto counted = [&made] {
    ++made;
    return Message("counted")();
  };
  queue_.Push(0, counted);
  queue_.Push(0, counted);
  EXPECT_EQ(made, 0);
  queue_.Push(0, Message("c"));
  queue_.Attach(&transport_);
  EXPECT_EQ(made, 1);
}

TEST_F(LaneQueueTest, AbortBreaksOffTheWriteAndDropsTheRest) {
  queue_.Attach(&transport_);
  queue_.Push(1, Message("a"));
  queue_.Push(1, Message("b"));
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
  queue_.Push(1, Message("a"));
  queue_.Close();
  queue_.Abort(absl::AbortedError("enough"));
  queue_.OnWriteDone(true);
  ASSERT_EQ(transport_.ends.size(), 1);
  EXPECT_EQ(transport_.ends[0], absl::AbortedError("enough"));
}

TEST_F(LaneQueueTest, AbortedBeforeAttachEndsOnAttach) {
  queue_.Push(1, Message("a"));
  queue_.Abort(absl::AbortedError("enough"));
  queue_.Attach(&transport_);
  EXPECT_TRUE(transport_.sent.empty());
  ASSERT_EQ(transport_.ends.size(), 1);
}

TEST_F(LaneQueueTest, AFailedWriteEndsTheStream) {
  queue_.Attach(&transport_);
  queue_.Push(1, Message("a"));
  queue_.Push(1, Message("b"));
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
  queue_.Push(1, Message("a"));
  clock_.now += absl::Seconds(3);
  EXPECT_EQ(queue_.StalledFor(clock_.now), absl::Seconds(3));
  EXPECT_FALSE(queue_.idle());
  queue_.OnWriteDone(true);
  EXPECT_EQ(queue_.StalledFor(clock_.now), absl::ZeroDuration());
  EXPECT_TRUE(queue_.idle());
}

}  // namespace
}  // namespace prefilld::server
