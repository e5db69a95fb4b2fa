#include "client/prefill_client.h"

#include <set>
#include <thread>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "grpcpp/server_context.h"
#include "gtest/gtest.h"
#include "tests/client/scripted_server.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::AttachLaneRequest;
using ::prefill::v1::KvFrame;
using ::prefill::v1::KvLayout;
using ::prefill::v1::PrefillEvent;
using ::prefill::v1::PrefillRequest;
using ::prefill::v1::PrefillResult;
using ::testing::HasSubstr;

class RecordingSink : public KvSink {
 public:
  absl::Status OnAccepted(const ::prefill::v1::Accepted&) override { return accept_status; }
  absl::Status OnProgress(const ::prefill::v1::Progress&) override {
    ++progress;
    return absl::OkStatus();
  }
  absl::Status OnFrame(const wire::ReceivedFrame& frame) override {
    absl::MutexLock lock(&mu);
    std::string bytes(frame.payload.size(), '\0');
    frame.payload.CopyTo(reinterpret_cast<uint8_t*>(bytes.data()));
    payloads[{frame.layer, frame.first_block}] = bytes;
    return frame_status;
  }

  absl::Status accept_status;
  absl::Status frame_status;
  int progress = 0;
  absl::Mutex mu;
  std::map<std::pair<uint32_t, uint32_t>, std::string> payloads;
};

absl::StatusOr<PrefillResult> Call(const ScriptedServer& server, KvSink& sink,
                                   const PrefillRequest& request = SmallRequest(),
                                   const PrefillCallOptions& options = {}) {
  auto client = PrefillClient::Create({.address = server.address()});
  EXPECT_TRUE(client.ok());
  return (*client)->Prefill(request, sink, options);
}

// Writes Accepted, one frame per layer after `edit` has changed it, and the result.
ScriptedServer::PrefillScript OneFramePerLayer(std::function<void(KvFrame&)> edit = nullptr) {
  return [edit](grpc::ServerContext&, const PrefillRequest&, PrefillWriter& writer) {
    const KvLayout layout = SmallLayout();
    writer.Write(AcceptedEvent(layout, 1));
    for (uint32_t layer = 0; layer < 3; ++layer) {
      PrefillEvent event = FrameEvent(layout, 0, layer, layer, 0, 3);
      if (edit) edit(*event.mutable_kv_frame());
      writer.Write(event);
    }
    writer.Write(ResultEvent({3}));
    return grpc::Status::OK;
  };
}

TEST(PrefillClient, DeliversEveryFrameAndTheResult) {
  ScriptedServer server(OneFramePerLayer());
  RecordingSink sink;
  const auto result = Call(server, sink);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->first_token().token_id(), 7);
  ASSERT_EQ(sink.payloads.size(), 3);
  const PrefillEvent sent = FrameEvent(SmallLayout(), 0, 2, 2, 0, 3);
  EXPECT_EQ((sink.payloads[{2, 0}]), sent.kv_frame().payload());
}

TEST(PrefillClient, RefusesACorruptedPayload) {
  ScriptedServer server(OneFramePerLayer([](KvFrame& frame) {
    if (frame.layer() == 1) (*frame.mutable_payload())[100] ^= 1;
  }));
  RecordingSink sink;
  const auto result = Call(server, sink);
  EXPECT_EQ(result.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(result.status().message(), HasSubstr("frame 1 (layer 1, blocks from 0): checksum"));
  EXPECT_EQ(sink.payloads.count({1, 0}), 0) << "a damaged frame reached the sink";
}

TEST(PrefillClient, RefusesAGapInTheSequence) {
  ScriptedServer server(OneFramePerLayer([](KvFrame& frame) {
    if (frame.layer() == 2) frame.set_sequence(3);
  }));
  RecordingSink sink;
  const auto result = Call(server, sink);
  EXPECT_EQ(result.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(result.status().message(), "lane 0: frame 3 arrived where 2 was due");
}

TEST(PrefillClient, RefusesAPayloadOfTheWrongSize) {
  ScriptedServer server(OneFramePerLayer([](KvFrame& frame) {
    frame.mutable_payload()->resize(frame.payload().size() - 4);
    SetChecksum(frame);
  }));
  RecordingSink sink;
  const auto result = Call(server, sink);
  EXPECT_EQ(result.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(result.status().message(), HasSubstr("payload of 6140 bytes, 3 blocks have 6144"));
}

TEST(PrefillClient, RefusesBlocksOutsideTheLayoutOrSentTwice) {
  RecordingSink sink;
  ScriptedServer outside(OneFramePerLayer([](KvFrame& frame) { frame.set_first_block(1); }));
  EXPECT_THAT(Call(outside, sink).status().message(), HasSubstr("outside the layout"));
  ScriptedServer overflow(OneFramePerLayer([](KvFrame& frame) { frame.set_num_blocks(~0u); }));
  EXPECT_THAT(Call(overflow, sink).status().message(), HasSubstr("outside the layout"));
  ScriptedServer layer(OneFramePerLayer([](KvFrame& frame) { frame.set_layer(3); }));
  EXPECT_THAT(Call(layer, sink).status().message(), HasSubstr("outside the layout"));
  ScriptedServer twice(OneFramePerLayer([](KvFrame& frame) { frame.set_layer(0); }));
  EXPECT_THAT(Call(twice, sink).status().message(), HasSubstr("arrived before"));
}

TEST(PrefillClient, MissingFramesAreDataLossThoughTheServerSaysOk) {
  ScriptedServer server([](grpc::ServerContext&, const PrefillRequest&, PrefillWriter& writer) {
    writer.Write(AcceptedEvent(SmallLayout(), 1));
    writer.Write(FrameEvent(SmallLayout(), 0, 0, 0, 0, 3));
    writer.Write(ResultEvent({1}));
    return grpc::Status::OK;
  });
  RecordingSink sink;
  const auto result = Call(server, sink);
  EXPECT_EQ(result.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(result.status().message(), HasSubstr("6 blocks were never sent"));
}

TEST(PrefillClient, AStreamThatEndsWithoutResultIsDataLoss) {
  ScriptedServer server([](grpc::ServerContext&, const PrefillRequest&, PrefillWriter& writer) {
    writer.Write(AcceptedEvent(SmallLayout(), 1));
    return grpc::Status::OK;
  });
  RecordingSink sink;
  const auto result = Call(server, sink);
  EXPECT_EQ(result.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(result.status().message(), HasSubstr("without a result"));
}

TEST(PrefillClient, RefusesMoreOrFewerLogprobsThanAskedFor) {
  PrefillEvent last = ResultEvent({0});
  ScriptedServer server(
      [&last](grpc::ServerContext&, const PrefillRequest& request, PrefillWriter& writer) {
        KvLayout layout = SmallLayout();
        layout.set_first_block(request.layout().first_block());
        writer.Write(AcceptedEvent(layout, 1));
        writer.Write(last);
        return grpc::Status::OK;
      });
  PrefillRequest request = SmallRequest();
  request.mutable_layout()->set_first_block(3);  // no frames
  const auto call = [&](bool prompt_logprobs) {
    request.set_prompt_logprobs(prompt_logprobs);
    RecordingSink sink;
    return Call(server, sink, request).status();
  };
  EXPECT_TRUE(call(false).ok()) << call(false);
  EXPECT_EQ(call(true).code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(call(true).message(), "0 prompt_logprobs arrived; 39 are due");
  for (int i = 0; i < 39; ++i) last.mutable_result()->add_prompt_logprobs(-1.0f);
  EXPECT_EQ(call(true).message(), "0 best_logprobs arrived; 39 are due");
  for (int i = 0; i < 39; ++i) last.mutable_result()->add_best_logprobs(-1.0f);
  EXPECT_TRUE(call(true).ok()) << call(true);
  EXPECT_EQ(call(false).message(), "39 prompt_logprobs arrived; 0 are due");
}

TEST(PrefillClient, TheServersStatusComesThrough) {
  ScriptedServer server([](grpc::ServerContext&, const PrefillRequest&, PrefillWriter&) {
    return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "queue full", "details");
  });
  RecordingSink sink;
  const auto result = Call(server, sink);
  EXPECT_EQ(result.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(result.status().message(), "queue full");
}

TEST(PrefillClient, RefusesALayoutThatWasNotAskedFor) {
  KvLayout layout = SmallLayout();
  ScriptedServer server([&](grpc::ServerContext&, const PrefillRequest&, PrefillWriter& writer) {
    writer.Write(AcceptedEvent(layout, 1));
    writer.Write(ResultEvent({0}));
    return grpc::Status::OK;
  });
  RecordingSink sink;
  const auto refused = [&](const PrefillRequest& request, const char* field) {
    const absl::Status status = Call(server, sink, request).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_THAT(status.message(), HasSubstr(field));
  };
  PrefillRequest request = SmallRequest();
  request.mutable_layout()->set_block_tokens(64);
  refused(request, "block_tokens is 16, expected 64");
  request = SmallRequest();
  request.mutable_layout()->set_order(::prefill::v1::KV_ORDER_HND);
  refused(request, "order");
  request = SmallRequest();
  request.mutable_layout()->set_dtype(::prefill::v1::DTYPE_BF16);
  refused(request, "dtype");
  request = SmallRequest();
  request.mutable_layout()->set_first_head(1);
  refused(request, "first_head");
  request = SmallRequest();
  request.mutable_layout()->set_first_block(1);
  refused(request, "first_block");
  request = SmallRequest();
  request.set_model_fingerprint("beef");
  refused(request, "model_fingerprint is f00d, expected beef");
  layout.set_num_tokens(41);
  refused(SmallRequest(), "num_tokens");
  layout = SmallLayout();
  layout.set_num_heads(0xffffffff);
  refused(SmallRequest(), "num_heads");
  layout = SmallLayout();
  layout.set_keys_rotated(false);
  refused(SmallRequest(), "keys_rotated");
}

// Lane 0 carries layer 0, and lane 1 carries the others.
class TwoLanes : public ::testing::Test {
 protected:
  static PrefillRequest Request() {
    PrefillRequest request = SmallRequest();
    request.set_num_lanes(2);
    return request;
  }
  // Lane 0 ends only once lane 1 was attached, as the real server's would.
  ScriptedServer::PrefillScript Lane0(std::vector<uint64_t> frames_per_lane) {
    return [=, this](grpc::ServerContext&, const PrefillRequest&, PrefillWriter& writer) {
      writer.Write(AcceptedEvent(SmallLayout(), 2));
      writer.Write(FrameEvent(SmallLayout(), 0, 0, 0, 0, 3));
      attached_.WaitForNotificationWithTimeout(absl::Seconds(10));
      writer.Write(ResultEvent(frames_per_lane));
      return grpc::Status::OK;
    };
  }
  ScriptedServer::LaneScript Lane1(uint32_t lane_number, uint32_t num_layers) {
    return [=, this](const AttachLaneRequest& request, PrefillWriter& writer) {
      EXPECT_EQ(request.request_id(), "r1");
      EXPECT_EQ(request.lane(), 1);
      for (uint32_t i = 0; i < num_layers; ++i) {
        writer.Write(FrameEvent(SmallLayout(), lane_number, i, i + 1, 0, 3));
      }
      attached_.Notify();
      return grpc::Status::OK;
    };
  }

  absl::Notification attached_;
  RecordingSink sink_;
};

TEST_F(TwoLanes, EachHasItsOwnConnection) {
  ScriptedServer server(Lane0({1, 2}), Lane1(1, 2));
  const auto result = Call(server, sink_, Request());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(sink_.payloads.size(), 3);
  const std::vector<std::string> peers = server.peers();
  EXPECT_EQ(std::set<std::string>(peers.begin(), peers.end()).size(), 2);
}

TEST_F(TwoLanes, AFrameMissingOnOneLaneIsDataLoss) {
  ScriptedServer server(Lane0({1, 2}), Lane1(1, 1));
  const auto result = Call(server, sink_, Request());
  EXPECT_EQ(result.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(result.status().message(), "lane 1: 1 frames arrived of 2 sent");
}

TEST_F(TwoLanes, AFrameOfAnotherLaneIsDataLoss) {
  ScriptedServer server(Lane0({1, 2}), Lane1(0, 2));
  const auto result = Call(server, sink_, Request());
  EXPECT_EQ(result.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(result.status().message(), "a frame of lane 0 arrived on lane 1");
}

TEST_F(TwoLanes, ALaneThatCannotBeAttachedEndsTheCall) {
  absl::Notification cancelled;
  ScriptedServer server(
      [&](grpc::ServerContext& context, const PrefillRequest&, PrefillWriter& writer) {
        writer.Write(AcceptedEvent(SmallLayout(), 2));
        while (!context.IsCancelled()) absl::SleepFor(absl::Milliseconds(1));
        cancelled.Notify();
        return grpc::Status::CANCELLED;
      });
  const auto result = Call(server, sink_, Request());
  EXPECT_EQ(result.status().code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(cancelled.WaitForNotificationWithTimeout(absl::Seconds(30)));
}

// Plays a server that sends Accepted and then says nothing until the client is gone.
ScriptedServer::PrefillScript SilentUntilCancelled(absl::Notification& accepted) {
  return [&accepted](grpc::ServerContext& context, const PrefillRequest&, PrefillWriter& writer) {
    writer.Write(AcceptedEvent(SmallLayout(), 1));
    accepted.Notify();
    while (!context.IsCancelled()) absl::SleepFor(absl::Milliseconds(1));
    return grpc::Status::CANCELLED;
  };
}

TEST(PrefillClient, CancellationEndsASilentCall) {
  absl::Notification accepted;
  ScriptedServer server(SilentUntilCancelled(accepted));
  Cancellation cancellation;
  std::thread canceller([&] {
    accepted.WaitForNotification();
    cancellation.Cancel();
  });
  RecordingSink sink;
  const auto result = Call(server, sink, SmallRequest(), {.cancellation = &cancellation});
  canceller.join();
  EXPECT_EQ(result.status().code(), absl::StatusCode::kCancelled);
}

TEST(PrefillClient, MetadataGoesWithTheCall) {
  std::string tenant;
  ScriptedServer server(
      [&](grpc::ServerContext& context, const PrefillRequest& request, PrefillWriter& writer) {
        const auto found = context.client_metadata().find("x-tenant");
        if (found != context.client_metadata().end()) {
          tenant = std::string(found->second.data(), found->second.size());
        }
        return OneFramePerLayer()(context, request, writer);
      });
  RecordingSink sink;
  const auto result = Call(server, sink, SmallRequest(), {.metadata = {{"x-tenant", "search"}}});
  EXPECT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(tenant, "search");
}

TEST(PrefillClient, RefusesMetadataThatCannotBeSent) {
  ScriptedServer server(OneFramePerLayer());
  RecordingSink sink;
  for (const auto& [key, value] : Metadata{{"X-Tenant", "a"},
                                           {"", "a"},
                                           {"x tenant", "a"},
                                           {"tenant-bin", "a"},
                                           {"grpc-x", "a"},
                                           {"x", "a\nb"}}) {
    const auto result = Call(server, sink, SmallRequest(), {.metadata = {{key, value}}});
    EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument) << key;
  }
}

TEST(PrefillClient, CancelledBeforehandItDoesNotCall) {
  ScriptedServer server(OneFramePerLayer());
  Cancellation cancellation;
  cancellation.Cancel();
  RecordingSink sink;
  const auto result = Call(server, sink, SmallRequest(), {.cancellation = &cancellation});
  EXPECT_EQ(result.status().code(), absl::StatusCode::kCancelled);
  EXPECT_TRUE(sink.payloads.empty());
}

TEST(PrefillClient, TheDeadlineEndsASilentCall) {
  absl::Notification accepted;
  ScriptedServer server(SilentUntilCancelled(accepted));
  RecordingSink sink;
  const auto result =
      Call(server, sink, SmallRequest(), {.deadline = absl::Now() + absl::Milliseconds(100)});
  EXPECT_EQ(result.status().code(), absl::StatusCode::kDeadlineExceeded);
}

TEST(PrefillClient, TheSinksErrorCancelsTheCall) {
  absl::Notification accepted;
  ScriptedServer server(SilentUntilCancelled(accepted));
  RecordingSink sink;
  sink.accept_status = absl::ResourceExhaustedError("no room");
  EXPECT_EQ(Call(server, sink).status().message(), "no room");

  ScriptedServer frames(OneFramePerLayer());
  sink.accept_status = absl::OkStatus();
  sink.frame_status = absl::InternalError("store failed");
  EXPECT_EQ(Call(frames, sink).status().message(), "store failed");
}

TEST(PrefillClient, AServerThatIsNotThereIsUnavailable) {
  auto client = PrefillClient::Create({.address = "127.0.0.1:1"});
  ASSERT_TRUE(client.ok());
  RecordingSink sink;
  EXPECT_EQ((*client)->Prefill(SmallRequest(), sink).status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ((*client)->GetServerInfo(absl::Seconds(1)).status().code(),
            absl::StatusCode::kUnavailable);
}

TEST(PrefillClient, AServerThatDiesMidStreamIsUnavailable) {
  absl::Notification accepted;
  auto server = std::make_unique<ScriptedServer>(SilentUntilCancelled(accepted));
  auto client = PrefillClient::Create({.address = server->address()});
  std::thread killer([&] {
    accepted.WaitForNotification();
    server.reset();
  });
  RecordingSink sink;
  const absl::Status status = (*client)->Prefill(SmallRequest(), sink).status();
  killer.join();
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
}

TEST(PrefillClient, AnUnreadableTlsFileIsRefusedAtOnce) {
  TlsOptions tls;
  tls.ca_file = "/nonexistent.pem";
  const auto client = PrefillClient::Create({.address = "localhost:1", .tls = tls});
  EXPECT_EQ(client.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(client.status().message(), HasSubstr("ca_file /nonexistent.pem"));
}

}  // namespace
}  // namespace prefilld::client
