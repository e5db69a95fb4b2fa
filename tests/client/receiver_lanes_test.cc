// Tests caches that are pushed to a worker on lanes, whose streams break.
#include <memory>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "tests/client/worker_fixture.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::ReceiveReceipt;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kKey[] = "0123456789abcdef0123456789abcdef";
constexpr char kOtherKey[] = "0123456789abcdef0123456789abcdee";

class ReceiverLanes : public WorkerServices {
 protected:
  ReceiverLanes() { options_.push_resume_window = absl::Seconds(20); }

  // A stream of one lane, which has sent its opening message.
  struct Lane {
    Lane(KvReceiver::Stub& stub, uint32_t lane, uint32_t num_lanes, const std::string& key,
         const KvLayout& layout = SmallLayout())
        : stream(stub.ReceiveLane(&context)) {
      ReceiveRequest message;
      auto& open = *message.mutable_open();
      open.set_transfer_id("t1");
      *open.mutable_layout() = layout;
      open.set_lane(lane);
      open.set_num_lanes(num_lanes);
      open.set_transfer_key(key);
      stream->Write(message);
    }
    ~Lane() { context.TryCancel(); }

    void Send(const KvFrame& frame) {
      ReceiveRequest message;
      *message.mutable_kv_frame() = frame;
      stream->Write(message);
    }
    void SendResult(const std::vector<uint64_t>& frames) {
      ReceiveRequest message;
      *message.mutable_result() = ResultEvent(frames).result();
      stream->Write(message);
    }
    // Reads receipts until one says that so many frames have come. Collects the damaged ones.
    bool AwaitReceived(uint64_t received) {
      ReceiveReceipt receipt;
      do {
        if (!stream->Read(&receipt)) return false;
        damaged.insert(damaged.end(), receipt.damaged().begin(), receipt.damaged().end());
      } while (receipt.received() < received);
      last = receipt;
      return true;
    }
    bool AwaitDamaged() {
      ReceiveReceipt receipt;
      while (damaged.empty() && stream->Read(&receipt)) {
        damaged.assign(receipt.damaged().begin(), receipt.damaged().end());
      }
      return !damaged.empty();
    }
    bool AwaitComplete() {
      do {
        if (!AwaitReceived(0)) return false;
      } while (!last.complete());
      return true;
    }
    grpc::Status End() {
      ReceiveReceipt receipt;
      while (stream->Read(&receipt)) continue;
      return stream->Finish();
    }

    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientReaderWriter<ReceiveRequest, ReceiveReceipt>> stream;
    ReceiveReceipt last;
    std::vector<uint64_t> damaged;
  };

  std::unique_ptr<Lane> Open(uint32_t lane = 0, uint32_t num_lanes = 1, const char* key = kKey) {
    return std::make_unique<Lane>(*receiver_stub_, lane, num_lanes, key);
  }
  void SendAll(const char* key) {
    const auto lane = Open(0, 1, key);
    for (uint32_t i = 0; i < 3; ++i) lane->Send(FrameOf(0, i, i));
    EXPECT_TRUE(lane->AwaitReceived(3));
    lane->SendResult({3});
    EXPECT_TRUE(lane->AwaitComplete());
  }
  static KvFrame FrameOf(uint32_t lane, uint64_t sequence, uint32_t layer) {
    return FrameEvent(SmallLayout(), lane, sequence, layer, 0, 3).kv_frame();
  }
  static void ExpectOk(const Reply& reply) {
    ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
    EXPECT_THAT(reply.tokens, ElementsAre(7, 8, 9, 10));
  }
};

TEST_F(ReceiverLanes, EachFrameIsAcknowledgedAndTheResultCompletesAll) {
  ExpectOk(GenerateWithPush([&] {
    const auto first = Open(0, 2), second = Open(1, 2);
    first->Send(FrameOf(0, 0, 0));
    second->Send(FrameOf(1, 0, 2));
    first->Send(FrameOf(0, 1, 1));
    EXPECT_TRUE(first->AwaitReceived(2));
    EXPECT_TRUE(second->AwaitReceived(1));
    EXPECT_FALSE(first->last.complete());
    first->SendResult({2, 1});
    EXPECT_TRUE(first->AwaitComplete());
    EXPECT_TRUE(first->End().ok());
  }));
  EXPECT_EQ(decoder_.stored().size(), 18);
  ExpectPoolFree();
}

TEST_F(ReceiverLanes, AStreamThatBreaksIsFollowedByAnotherThatIsToldWhereToGoOn) {
  ExpectOk(GenerateWithPush([&] {
    auto lane = Open();
    EXPECT_TRUE(lane->AwaitReceived(0));
    lane->Send(FrameOf(0, 0, 0));
    lane->Send(FrameOf(0, 1, 1));
    EXPECT_TRUE(lane->AwaitReceived(2));
    lane->context.TryCancel();
    lane = Open();
    EXPECT_TRUE(lane->AwaitReceived(0));
    EXPECT_EQ(lane->last.received(), 2);
    lane->Send(FrameOf(0, 1, 1));  // it comes again
    lane->Send(FrameOf(0, 2, 2));
    EXPECT_TRUE(lane->AwaitReceived(3));
    lane->SendResult({3});
    EXPECT_TRUE(lane->AwaitComplete());
  }));
  EXPECT_EQ(decoder_.stored().size(), 18);
}

TEST_F(ReceiverLanes, AStreamTakesThePlaceOfOneThatStillSeemsAlive) {
  ExpectOk(GenerateWithPush([&] {
    const auto before = Open();
    before->Send(FrameOf(0, 0, 0));
    EXPECT_TRUE(before->AwaitReceived(1));
    const auto after = Open();
    EXPECT_TRUE(after->AwaitReceived(1));
    EXPECT_EQ(before->End().error_code(), grpc::StatusCode::ABORTED);
    after->Send(FrameOf(0, 1, 1));
    after->Send(FrameOf(0, 2, 2));
    EXPECT_TRUE(after->AwaitReceived(3));
    after->SendResult({3});
    EXPECT_TRUE(after->AwaitComplete());
  }));
}

TEST_F(ReceiverLanes, AStrangerTakesNobodysPlace) {
  ExpectOk(GenerateWithPush([&] {
    const auto lane = Open();
    EXPECT_TRUE(lane->AwaitReceived(0));
    const grpc::Status stranger = Open(0, 1, kOtherKey)->End();
    EXPECT_EQ(stranger.error_code(), grpc::StatusCode::PERMISSION_DENIED);
    EXPECT_EQ(stranger.error_message(), "transfer_key: not the one of this transfer");
    ReceiveResponse response;
    EXPECT_EQ(Push(SmallLayout(), AllFrames(), &response).error_code(),
              grpc::StatusCode::NOT_FOUND);
    for (uint32_t i = 0; i < 3; ++i) lane->Send(FrameOf(0, i, i));
    EXPECT_TRUE(lane->AwaitReceived(3));
    lane->SendResult({3});
    EXPECT_TRUE(lane->AwaitComplete());
  }));
}

TEST_F(ReceiverLanes, AnOpeningThatMakesNoSenseIsRefusedWithFieldValueAndLimit) {
  ExpectOk(GenerateWithPush([&] {
    const auto refused = [&](uint32_t lane, uint32_t num_lanes, const char* key,
                             const char* message) {
      const grpc::Status status = Open(lane, num_lanes, key)->End();
      EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
      EXPECT_THAT(status.error_message(), HasSubstr(message));
    };
    refused(0, 1, "short", "transfer_key has 5 characters; at least 32");
    const auto lane = Open(0, 2);
    EXPECT_TRUE(lane->AwaitReceived(0));
    refused(0, 0, kKey, "num_lanes 0; from 1 to 16");
    refused(0, 17, kKey, "num_lanes 17; from 1 to 16");
    refused(2, 2, kKey, "lane 2; num_lanes is 2");
    refused(1, 3, kKey, "num_lanes 3; the transfer has 2");
    for (uint32_t i = 0; i < 3; ++i) lane->Send(FrameOf(0, i, i));
    EXPECT_TRUE(lane->AwaitReceived(3));
    lane->SendResult({3, 0});
    EXPECT_TRUE(lane->AwaitComplete());
  }));
}

TEST_F(ReceiverLanes, ADamagedFrameIsNamedAndComesAgain) {
  ExpectOk(GenerateWithPush([&] {
    const auto lane = Open();
    KvFrame damaged = FrameOf(0, 1, 1);
    (*damaged.mutable_payload())[50] ^= 4;
    lane->Send(FrameOf(0, 0, 0));
    lane->Send(damaged);
    lane->Send(FrameOf(0, 2, 2));
    EXPECT_TRUE(lane->AwaitDamaged());
    EXPECT_THAT(lane->damaged, ElementsAre(1));
    lane->Send(FrameOf(0, 1, 1));
    EXPECT_TRUE(lane->AwaitReceived(3));
    lane->SendResult({3});
    EXPECT_TRUE(lane->AwaitComplete());
  }));
  EXPECT_EQ(decoder_.stored().size(), 18);
}

// The number of the frame is damaged, and so the stream cannot go on.
TEST_F(ReceiverLanes, AStreamThatMakesNoSenseEndsAlone) {
  ExpectOk(GenerateWithPush([&] {
    auto lane = Open();
    lane->Send(FrameOf(0, 0, 0));
    lane->Send(FrameOf(0, 5, 1));
    EXPECT_EQ(lane->End().error_code(), grpc::StatusCode::DATA_LOSS);
    lane = Open();
    EXPECT_TRUE(lane->AwaitReceived(1));
    lane->Send(FrameOf(0, 1, 1));
    lane->Send(FrameOf(0, 2, 2));
    EXPECT_TRUE(lane->AwaitReceived(3));
    lane->SendResult({3});
    EXPECT_TRUE(lane->AwaitComplete());
  }));
}

TEST_F(ReceiverLanes, AResultWithAFrameMissingIsDataLossOnBothSides) {
  const Reply reply = GenerateWithPush([&] {
    const auto lane = Open();
    lane->Send(FrameOf(0, 0, 0));
    lane->SendResult({1});
    EXPECT_EQ(lane->End().error_code(), grpc::StatusCode::DATA_LOSS);
  });
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::DATA_LOSS);
  ExpectPoolFree();
}

TEST_F(ReceiverLanes, ASenderWhoStaysAwayEndsTheWaitAfterTheWindow) {
  for (const absl::Duration window : {absl::Milliseconds(300), absl::ZeroDuration()}) {
    options_.push_resume_window = window;
    const absl::Time start = absl::Now();
    const Reply reply = GenerateWithPush([&] {
      const auto lane = Open();
      lane->Send(FrameOf(0, 0, 0));
      EXPECT_TRUE(lane->AwaitReceived(1));
    });
    EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::UNAVAILABLE);
    EXPECT_GE(absl::Now() - start, window);
    ExpectPoolFree();
    EXPECT_EQ(Open()->End().error_code(), grpc::StatusCode::NOT_FOUND);
  }
}

// The connection broke under the receipt.
TEST_F(ReceiverLanes, ASenderWhoComesBackToACompleteTransferIsTold) {
  ExpectOk(GenerateWithPush([&] { SendAll(kKey); }));
  ExpectPoolFree();
  const auto again = Open();
  EXPECT_TRUE(again->AwaitComplete());
  EXPECT_EQ(again->last.received(), 3);
  EXPECT_TRUE(again->End().ok());
  EXPECT_EQ(Open(0, 1, kOtherKey)->End().error_code(), grpc::StatusCode::PERMISSION_DENIED);
}

// A sender whose connection broke without a word learns it after kKeepAliveTimeMs and
// kKeepAliveTimeoutMs alone, and has the window from then on.
TEST_F(ReceiverLanes, ACompleteTransferIsRememberedForLongerThanTheWindow) {
  options_.push_resume_window = absl::Milliseconds(100);
  ExpectOk(GenerateWithPush([&] { SendAll(kKey); }));
  absl::SleepFor(2 * options_.push_resume_window);
  EXPECT_TRUE(Open()->AwaitComplete());
}

TEST_F(ReceiverLanes, WithoutAWindowNoCompleteTransferIsRemembered) {
  options_.push_resume_window = absl::ZeroDuration();
  ExpectOk(GenerateWithPush([&] { SendAll(kKey); }));
  EXPECT_EQ(Open()->End().error_code(), grpc::StatusCode::NOT_FOUND);
}

// A router may use an id again at once.
TEST_F(ReceiverLanes, ASenderWhoComesBackTakesNoOtherTransferWithItsId) {
  ExpectOk(GenerateWithPush([&] { SendAll(kKey); }));
  ExpectOk(GenerateWithPush([&] {
    EXPECT_TRUE(Open()->AwaitComplete());
    SendAll(kOtherKey);
  }));
}

// Each of them has to come again, and would be remembered until then.
TEST_F(ReceiverLanes, NoMoreDamagedFramesAreAwaitedThanBlocksAreMissing) {
  options_.push_resume_window = absl::Milliseconds(300);
  const Reply reply = GenerateWithPush([&] {
    const auto lane = Open();
    const uint64_t blocks = 9;
    for (uint64_t i = 0; i <= blocks; ++i) {
      KvFrame damaged = FrameOf(0, i, 0);
      damaged.set_checksum(damaged.checksum() + 1);
      lane->Send(damaged);
    }
    ReceiveReceipt receipt;
    int named = 0;
    while (lane->stream->Read(&receipt)) named += receipt.damaged_size();
    EXPECT_LE(named, blocks);
    const grpc::Status end = lane->stream->Finish();
    EXPECT_EQ(end.error_code(), grpc::StatusCode::DATA_LOSS);
    EXPECT_THAT(end.error_message(), HasSubstr("frame 9"));
  });
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  ExpectPoolFree();
}

TEST_F(ReceiverLanes, CancellingTheWaitEndsEveryLane) {
  GenerateRequest request = Request();
  request.set_pushed_transfer_id("t1");
  grpc::ClientContext context;
  const auto stream = stub_->Generate(&context, request);
  GenerateEvent event;
  ASSERT_TRUE(stream->Read(&event));
  const auto first = Open(0, 2), second = Open(1, 2);
  EXPECT_TRUE(first->AwaitReceived(0));
  EXPECT_TRUE(second->AwaitReceived(0));
  context.TryCancel();
  EXPECT_EQ(first->End().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_EQ(second->End().error_code(), grpc::StatusCode::CANCELLED);
  stream->Finish();
  ExpectPoolFree();
}

}  // namespace
}  // namespace prefilld::client
