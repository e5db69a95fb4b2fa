// Tests the load generator beside servers that this test plays.
#include "client/cli/load_run.h"

#include <atomic>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "grpcpp/server_context.h"
#include "tests/client/scripted_server.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::KvLayout;
using ::prefill::v1::PrefillEvent;
using ::prefill::v1::PrefillRequest;
using ::testing::ElementsAre;

constexpr int kTokens = 40;  // the played transfer's

// Sends a whole small cache and a result that says how long the server took.
grpc::Status Answer(PrefillWriter& writer) {
  const KvLayout layout = SmallLayout();
  writer.Write(AcceptedEvent(layout, 1));
  for (uint32_t layer = 0; layer < 3; ++layer) {
    writer.Write(FrameEvent(layout, 0, layer, layer, 0, 3));
  }
  PrefillEvent result = ResultEvent({3});
  result.mutable_result()->set_queue_us(200'000);
  result.mutable_result()->set_compute_us(300'000);
  result.mutable_result()->set_cached_tokens(16);
  writer.Write(result);
  return grpc::Status::OK;
}

class LoadRun : public ::testing::Test {
 protected:
  absl::StatusOr<LoadOutcome> Run(const ScriptedServer& server,
                                  const std::vector<LoadRequest>& requests) {
    std::vector<std::unique_ptr<PrefillClient>> clients;
    for (int i = 0; i < 2; ++i) {
      clients.push_back(*PrefillClient::Create({.address = server.address()}));
    }
    options_.vocab_size = 100;
    return RunLoad(requests, clients, options_, cancellation_, [](const LoadProgress&) {});
  }

  LoadOptions options_;
  Cancellation cancellation_;
};

std::vector<LoadRequest> Every(absl::Duration pause, int count) {
  std::vector<LoadRequest> requests;
  for (int i = 0; i < count; ++i) requests.push_back({.arrival = i * pause, .num_tokens = kTokens});
  return requests;
}

TEST_F(LoadRun, SendsEachRequestAtItsTimeAndTimesItsEnd) {
  absl::Mutex mu;
  std::vector<absl::Time> came;
  std::vector<int> priorities;
  std::vector<std::string> tenants;
  ScriptedServer server(
      [&](grpc::ServerContext& context, const PrefillRequest& request, PrefillWriter& writer) {
        {
          absl::MutexLock lock(&mu);
          came.push_back(absl::Now());
          priorities.push_back(request.priority());
          const auto tenant = context.client_metadata().find("x-tenant");
          tenants.emplace_back(tenant == context.client_metadata().end()
                                   ? ""
                                   : std::string(tenant->second.data(), tenant->second.size()));
        }
        EXPECT_EQ(request.token_ids_size(), kTokens);
        return Answer(writer);
      });
  auto requests = Every(absl::Milliseconds(150), 3);
  requests[1].priority = -3;
  requests[1].tenant = "reports";
  const absl::Time began = absl::Now();
  const auto outcome = Run(server, requests);
  ASSERT_TRUE(outcome.ok()) << outcome.status();
  ASSERT_EQ(outcome->ends.size(), 3);
  EXPECT_GE(came[2] - began, absl::Milliseconds(300));
  EXPECT_THAT(priorities, ElementsAre(0, -3, 0));
  EXPECT_THAT(tenants, ElementsAre("", "reports", ""));
  for (const LoadEnd& end : outcome->ends) {
    EXPECT_EQ(end.code, absl::StatusCode::kOk);
    EXPECT_GE(*end.first_token, absl::Milliseconds(500)) << "the server's own times count";
    EXPECT_GT(*end.last_block, absl::ZeroDuration());
    EXPECT_GE(*end.result, *end.last_block);
    EXPECT_EQ(end.kv_bytes, 3 * 6144);
    EXPECT_EQ(end.cached_tokens, 16);
  }
}

// The server holds every answer until all requests are there, so a sender that waits for answers
// would hang.
TEST_F(LoadRun, IsNotSlowedDownByTheServer) {
  std::atomic<int> came = 0;
  absl::Notification all_came;
  ScriptedServer server([&](grpc::ServerContext&, const PrefillRequest&, PrefillWriter& writer) {
    if (++came == 6) all_came.Notify();
    all_came.WaitForNotification();
    return Answer(writer);
  });
  const auto outcome = Run(server, Every(absl::Milliseconds(5), 6));
  ASSERT_TRUE(outcome.ok()) << outcome.status();
  EXPECT_EQ(outcome->ends.size(), 6);
  EXPECT_EQ(outcome->sender.most_in_flight, 6);
  EXPECT_EQ(outcome->sender.held_back, 0);
}

TEST_F(LoadRun, HoldsRequestsBackAtItsLimitAndSaysHowLateTheyWere) {
  std::atomic<int> at_once = 0, most = 0;
  ScriptedServer server([&](grpc::ServerContext&, const PrefillRequest&, PrefillWriter& writer) {
    const int now = ++at_once;
    most = std::max(most.load(), now);
    absl::SleepFor(absl::Milliseconds(100));
    --at_once;
    return Answer(writer);
  });
  options_.max_in_flight = 1;
  const auto outcome = Run(server, Every(absl::ZeroDuration(), 3));
  ASSERT_TRUE(outcome.ok()) << outcome.status();
  EXPECT_EQ(most, 1);
  EXPECT_EQ(outcome->sender.most_in_flight, 1);
  EXPECT_EQ(outcome->sender.held_back, 2);
  absl::Duration latest, longest;
  for (const LoadEnd& end : outcome->ends) {
    latest = std::max(latest, end.late);
    longest = std::max(longest, *end.result);
  }
  EXPECT_GE(latest, absl::Milliseconds(200));
  EXPECT_GE(longest, absl::Milliseconds(300)) << "counted from when it was due";
}

TEST_F(LoadRun, GoesOnAfterFailures) {
  std::atomic<int> calls = 0;
  ScriptedServer server([&](grpc::ServerContext&, const PrefillRequest&, PrefillWriter& writer) {
    switch (++calls) {
      case 1:
        return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "full");
      case 2: {
        writer.Write(AcceptedEvent(SmallLayout(), 1));
        PrefillEvent frame = FrameEvent(SmallLayout(), 0, 0, 0, 0, 3);
        (*frame.mutable_kv_frame()->mutable_payload())[5] ^= 1;
        writer.Write(frame);
        return grpc::Status::OK;
      }
      default:
        return Answer(writer);
    }
  });
  const auto outcome = Run(server, Every(absl::Milliseconds(100), 3));
  ASSERT_TRUE(outcome.ok()) << outcome.status();
  std::vector<absl::StatusCode> codes;
  for (const LoadEnd& end : outcome->ends) codes.push_back(end.code);
  EXPECT_THAT(codes, ElementsAre(absl::StatusCode::kResourceExhausted, absl::StatusCode::kDataLoss,
                                 absl::StatusCode::kOk));
}

TEST_F(LoadRun, AsksForTheLastBlocksAlone) {
  ScriptedServer server([&](grpc::ServerContext&, const PrefillRequest& request, PrefillWriter&) {
    EXPECT_EQ(request.layout().first_block(), 2);  // 40 tokens are 3 blocks of 16
    return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "seen");
  });
  options_.last_blocks = 1;
  EXPECT_EQ(Run(server, Every(absl::ZeroDuration(), 1))->ends[0].code,
            absl::StatusCode::kResourceExhausted);
}

TEST_F(LoadRun, ACancellationEndsWhatIsUnderWayAndSendsNoMore) {
  absl::Notification came;
  ScriptedServer server([&](grpc::ServerContext& context, const PrefillRequest&, PrefillWriter&) {
    came.Notify();
    while (!context.IsCancelled()) absl::SleepFor(absl::Milliseconds(1));
    return grpc::Status::CANCELLED;
  });
  std::thread interrupt([&] {
    came.WaitForNotification();
    cancellation_.Cancel();
  });
  const auto outcome = Run(server, Every(absl::Seconds(100), 2));
  interrupt.join();
  ASSERT_TRUE(outcome.ok()) << outcome.status();
  ASSERT_EQ(outcome->ends.size(), 1);
  EXPECT_EQ(outcome->ends[0].code, absl::StatusCode::kCancelled);
}

TEST_F(LoadRun, RefusesMetadataThatGrpcDoesNotCarry) {
  ScriptedServer server([](grpc::ServerContext&, const PrefillRequest&, PrefillWriter& writer) {
    return Answer(writer);
  });
  options_.tenant_key = "X-Tenant";
  auto requests = Every(absl::ZeroDuration(), 2);
  requests[1].tenant = "reports";
  EXPECT_EQ(Run(server, requests).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(PrefillClientStart, RefusesLanesAndCancellations) {
  const auto client = *PrefillClient::Create({.address = "127.0.0.1:1"});
  class : public KvSink {
    absl::Status OnAccepted(const ::prefill::v1::Accepted&) override { return absl::OkStatus(); }
    absl::Status OnProgress(const ::prefill::v1::Progress&) override { return absl::OkStatus(); }
    absl::Status OnFrame(const wire::ReceivedFrame&) override { return absl::OkStatus(); }
  } sink;
  PrefillRequest request = SmallRequest();
  request.set_num_lanes(2);
  const auto done = [](const absl::StatusOr<::prefill::v1::PrefillResult>&) { FAIL(); };
  EXPECT_EQ(client->Start(request, sink, {}, done).status().message(),
            "num_lanes 2; at most 1 without a thread that waits");
  request.set_num_lanes(1);
  Cancellation cancellation;
  EXPECT_EQ(client->Start(request, sink, {.cancellation = &cancellation}, done).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace prefilld::client
