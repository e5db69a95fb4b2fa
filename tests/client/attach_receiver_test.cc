// Tests the C++ client as a further receiver of a prompt that another call asked for.
#include <atomic>

#include "absl/synchronization/notification.h"
#include "client/prefill_client.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/scripted_server.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::AttachLaneRequest;
using ::prefill::v1::AttachReceiverRequest;
using ::prefill::v1::PrefillEvent;
using ::prefill::v1::PrefillResult;
using ::testing::HasSubstr;

class CountingSink : public KvSink {
 public:
  absl::Status OnAccepted(const ::prefill::v1::Accepted&) override { return absl::OkStatus(); }
  absl::Status OnProgress(const ::prefill::v1::Progress&) override { return absl::OkStatus(); }
  absl::Status OnFrame(const wire::ReceivedFrame&) override {
    ++frames;
    return absl::OkStatus();
  }

  std::atomic<int> frames = 0;
};

AttachReceiverRequest SmallAttachment() {
  AttachReceiverRequest request;
  request.set_request_id("r1");
  request.set_receiver_key("key");
  request.set_receiver(3);
  request.set_num_tokens(SmallLayout().num_tokens());
  return request;
}

absl::StatusOr<PrefillResult> Attach(const ScriptedServer& server, KvSink& sink,
                                     const AttachReceiverRequest& request) {
  auto client = PrefillClient::Create({.address = server.address()});
  EXPECT_TRUE(client.ok());
  return (*client)->AttachReceiver(request, sink);
}

TEST(AttachReceiver, ReceivesAndChecksItsShareOverItsOwnLanes) {
  AttachReceiverRequest seen;
  absl::Notification attached;
  ScriptedServer server(
      nullptr,
      [&](const AttachLaneRequest& request, PrefillWriter& writer) {
        EXPECT_EQ(request.receiver(), 3u);
        EXPECT_EQ(request.lane_key(), "lane key");
        writer.Write(FrameEvent(SmallLayout(), 1, 0, 1, 0, 3));
        writer.Write(FrameEvent(SmallLayout(), 1, 1, 2, 0, 3));
        attached.Notify();
        return grpc::Status::OK;
      },
      [&](const AttachReceiverRequest& request, PrefillWriter& writer) {
        seen = request;
        PrefillEvent accepted = AcceptedEvent(SmallLayout(), 2);
        accepted.mutable_accepted()->set_receiver(request.receiver());
        accepted.mutable_accepted()->set_lane_key("lane key");
        writer.Write(accepted);
        writer.Write(FrameEvent(SmallLayout(), 0, 0, 0, 0, 3));
        attached.WaitForNotificationWithTimeout(absl::Seconds(10));
        writer.Write(ResultEvent({1, 2}));
        return grpc::Status::OK;
      });
  AttachReceiverRequest request = SmallAttachment();
  request.set_num_lanes(2);
  CountingSink sink;
  const auto result = Attach(server, sink, request);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->first_token().token_id(), 7u);
  EXPECT_EQ(sink.frames, 3);
  EXPECT_EQ(seen.receiver_key(), "key");
  EXPECT_EQ(seen.receiver(), 3u);
}

TEST(AttachReceiver, RefusesALayoutThatItDidNotAskFor) {
  ScriptedServer server(nullptr, nullptr, [](const AttachReceiverRequest&, PrefillWriter& writer) {
    writer.Write(AcceptedEvent(SmallLayout(), 1));
    return grpc::Status::OK;
  });
  CountingSink sink;
  AttachReceiverRequest request = SmallAttachment();
  request.set_num_tokens(41);
  absl::Status status = Attach(server, sink, request).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(status.message(), HasSubstr("num_tokens is 40, expected 41"));
  request = SmallAttachment();
  request.mutable_layout()->set_first_head(1);
  status = Attach(server, sink, request).status();
  EXPECT_THAT(status.message(), HasSubstr("first_head is 0, expected 1"));
}

TEST(AttachReceiver, AMissingFrameIsDataLoss) {
  ScriptedServer server(nullptr, nullptr, [](const AttachReceiverRequest&, PrefillWriter& writer) {
    writer.Write(AcceptedEvent(SmallLayout(), 1));
    writer.Write(FrameEvent(SmallLayout(), 0, 0, 0, 0, 3));
    writer.Write(ResultEvent({1}));
    return grpc::Status::OK;
  });
  CountingSink sink;
  const absl::Status status = Attach(server, sink, SmallAttachment()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(status.message(), HasSubstr("6 blocks were never sent"));
}

TEST(AttachReceiver, DoesNotGuessWhichOfSeveralServersHasTheRequest) {
  auto client = PrefillClient::Create({}, {"127.0.0.1:1", "127.0.0.1:2"});
  ASSERT_TRUE(client.ok());
  CountingSink sink;
  const absl::Status status = (*client)->AttachReceiver(SmallAttachment(), sink).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(status.message(), HasSubstr("2 servers"));
}

}  // namespace
}  // namespace prefilld::client
