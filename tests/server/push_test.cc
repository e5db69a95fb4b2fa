// Tests KV pushed to a decode worker that prefilld calls.
#include <gmock/gmock.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "prefill/v1/receiver.grpc.pb.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;

// A receiver that takes all frames and answers as told.
class FakeReceiver final : public v1::KvReceiver::Service {
 public:
  enum class Behaviour {
    kTakeAll,
    kNobodyWaits,
    kFindDamage,
    kReadNothing,
    kForgetAFrame,
    kNeverAnswer
  };

  FakeReceiver() {
    grpc::ServerBuilder builder;
    builder.SetMaxReceiveMessageSize(-1);
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~FakeReceiver() override { Stop(); }
  void Stop() {
    if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
  }

  std::string address() const { return absl::StrCat("127.0.0.1:", port_); }
  std::atomic<Behaviour> behaviour = Behaviour::kTakeAll;
  std::atomic<int> frames_seen = 0;

  std::atomic<int> running = 0;

  std::vector<v1::ReceiveRequest> messages() {
    absl::MutexLock lock(&mu_);
    return messages_;
  }
  bool took_result() {
    absl::MutexLock lock(&mu_);
    return !messages_.empty() && messages_.back().has_result();
  }

  grpc::Status Receive(grpc::ServerContext* context, grpc::ServerReader<v1::ReceiveRequest>* reader,
                       v1::ReceiveResponse* response) override {
    ++running;
    const auto ended = absl::MakeCleanup([this] { --running; });
    if (behaviour == Behaviour::kNobodyWaits) {
      return grpc::Status(grpc::StatusCode::NOT_FOUND, "nobody waits for it");
    }
    while (behaviour == Behaviour::kReadNothing && !context->IsCancelled()) {
      absl::SleepFor(absl::Milliseconds(5));
    }
    v1::ReceiveRequest message;
    while (reader->Read(&message)) {
      if (message.has_kv_frame()) {
        ++frames_seen;
        response->set_kv_frames(response->kv_frames() + 1);
        response->set_kv_bytes(response->kv_bytes() + message.kv_frame().payload().size());
      }
      absl::MutexLock lock(&mu_);
      messages_.push_back(message);
    }
    while (behaviour == Behaviour::kNeverAnswer && !context->IsCancelled()) {
      absl::SleepFor(absl::Milliseconds(5));
    }
    if (behaviour == Behaviour::kForgetAFrame) response->set_kv_bytes(response->kv_bytes() - 1);
    if (behaviour == Behaviour::kFindDamage) {
      return grpc::Status(grpc::StatusCode::DATA_LOSS, "a checksum is wrong");
    }
    return grpc::Status::OK;
  }

 private:
  int port_ = 0;
  absl::Mutex mu_;
  std::vector<v1::ReceiveRequest> messages_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<grpc::Server> server_;
};

class Push : public ServerFixture {
 protected:
  Push() { options_.deliver_to_allow = {"127.0.0.1:*"}; }

  void PassStallTimeouts() {
    // The gauge is as old as the watchdog's latest round, and 0 before the first.
    EXPECT_TRUE(Eventually([&] { return Metric("prefilld_live_requests") > 0; }));
    EXPECT_TRUE(PassStallTimeoutsUntil([&] { return Metric("prefilld_live_requests") == 0; }));
  }

  v1::PrefillRequest PromptTo(const FakeReceiver& receiver, int num_tokens) {
    v1::PrefillRequest request = PromptOf(num_tokens, "pushed");
    request.mutable_deliver_to()->set_address(receiver.address());
    request.mutable_deliver_to()->set_transfer_id("transfer-7");
    return request;
  }
};

TEST_F(Push, BringsOpenFramesAndResultToTheReceiverAndProgressToTheCaller) {
  StartServer();
  FakeReceiver receiver;
  const StreamContents contents = Prefill(PromptTo(receiver, 5000));
  ASSERT_TRUE(contents.status.ok()) << contents.status.error_message();
  EXPECT_TRUE(contents.frames().empty());
  ASSERT_NE(contents.result(), nullptr);
  EXPECT_EQ(contents.result()->first_token().token_id(), 250);

  const std::vector<v1::ReceiveRequest> messages = receiver.messages();
  ASSERT_GE(messages.size(), 3);
  ASSERT_TRUE(messages.front().has_open());
  EXPECT_EQ(messages.front().open().transfer_id(), "transfer-7");
  const v1::KvLayout& layout = messages.front().open().layout();
  EXPECT_EQ(layout.SerializeAsString(),
            contents.events.front().accepted().layout().SerializeAsString());
  ASSERT_TRUE(messages.back().has_result());
  EXPECT_EQ(messages.back().result().first_token().token_id(), 250);
  std::vector<v1::KvFrame> frames;
  for (const auto& message : messages) {
    if (message.has_kv_frame()) frames.push_back(message.kv_frame());
  }
  EXPECT_EQ(messages.back().result().kv_frames(), frames.size());
  ExpectWholeCache(frames, layout);
  EXPECT_TRUE(EverythingIsFree());
}

// This receiver knows Receive alone.
TEST_F(Push, HasOneLaneThatEndsWithItsStreamWhereNobodyAcknowledges) {
  StartServer();
  FakeReceiver receiver;
  v1::PrefillRequest request = PromptTo(receiver, 5000);
  request.set_num_lanes(4);
  const StreamContents contents = Prefill(request);
  ASSERT_TRUE(contents.status.ok()) << contents.status.error_message();
  EXPECT_EQ(contents.result()->frames_per_lane_size(), 1);
  EXPECT_EQ(receiver.messages().front().open().transfer_key(), "");
  EXPECT_EQ(Metric("prefilld_plain_pushes_total"), 1);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(Metric("prefilld_kv_frames_retained"), 0);
}

TEST_F(Push, GoesToSuchAReceiverWhereTheOperatorWantsNoWindow) {
  options_.resume_window = absl::ZeroDuration();
  StartServer();
  FakeReceiver receiver;
  const StreamContents contents = Prefill(PromptTo(receiver, 5000));
  EXPECT_TRUE(contents.status.ok()) << contents.status.error_message();
  EXPECT_TRUE(receiver.took_result());
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(Push, TellsLogprobsToTheCallerAlone) {
  StartServer();
  FakeReceiver receiver;
  v1::PrefillRequest request = PromptTo(receiver, 100);
  request.set_prompt_logprobs(true);
  const StreamContents contents = Prefill(request);
  ASSERT_NE(contents.result(), nullptr) << contents.status.error_message();
  EXPECT_EQ(contents.result()->prompt_logprobs_size(), 99);
  EXPECT_EQ(contents.result()->best_logprobs_size(), 99);
  const std::vector<v1::ReceiveRequest> messages = receiver.messages();
  ASSERT_TRUE(messages.back().has_result());
  const v1::PrefillResult& received = messages.back().result();
  EXPECT_EQ(received.prompt_logprobs_size(), 0);
  EXPECT_EQ(received.best_logprobs_size(), 0);
  EXPECT_EQ(received.first_token().token_id(), contents.result()->first_token().token_id());
  EXPECT_EQ(received.frames_per_lane_size(), contents.result()->frames_per_lane_size());
}

struct Refusal {
  FakeReceiver::Behaviour behaviour;
  grpc::StatusCode code;
  const char* message;
};

class PushRefused : public Push, public ::testing::WithParamInterface<Refusal> {};

TEST_P(PushRefused, EndsTheRequestWithTheReceiversStatus) {
  StartServer();
  FakeReceiver receiver;
  receiver.behaviour = GetParam().behaviour;
  const StreamContents contents = Prefill(PromptTo(receiver, 1000));
  EXPECT_EQ(contents.status.error_code(), GetParam().code) << contents.status.error_message();
  EXPECT_THAT(contents.status.error_message(), HasSubstr(GetParam().message));
  EXPECT_THAT(contents.status.error_message(), HasSubstr(receiver.address()));
  EXPECT_EQ(contents.result(), nullptr);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(Metric("prefilld_requests_total{outcome=\"receiver_failed\"}"), 1);
}

INSTANTIATE_TEST_SUITE_P(
    Reasons, PushRefused,
    ::testing::Values(Refusal{FakeReceiver::Behaviour::kNobodyWaits, grpc::StatusCode::NOT_FOUND,
                              "nobody waits for it"},
                      Refusal{FakeReceiver::Behaviour::kFindDamage, grpc::StatusCode::DATA_LOSS,
                              "a checksum is wrong"},
                      Refusal{FakeReceiver::Behaviour::kForgetAFrame, grpc::StatusCode::DATA_LOSS,
                              "were sent"}));

TEST_F(Push, NoticesARefusalBeforeTheFirstFrame) {
  StartServer();
  FakeReceiver receiver;
  receiver.behaviour = FakeReceiver::Behaviour::kNobodyWaits;
  engine_->HoldAfter(0);
  EXPECT_EQ(Prefill(PromptTo(receiver, 1000)).status.error_code(), grpc::StatusCode::NOT_FOUND);
  engine_->HoldAfter(-1);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_LE(engine_->layers_run(), 1);
}

TEST_F(Push, ToAReceiverThatIsNotThereIsUnavailable) {
  StartServer();
  FakeReceiver receiver;
  receiver.Stop();
  const grpc::Status status = Prefill(PromptTo(receiver, 1000)).status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(status.error_message(), HasSubstr("deliver_to"));
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(Push, EndsWhenTheReceiverDiesInTheMiddle) {
  StartServer();
  FakeReceiver receiver;
  engine_->HoldAfter(2);
  OpenStream call(*stub_, PromptTo(receiver, 1000));
  EXPECT_TRUE(Eventually([&] { return receiver.frames_seen == 2; }));
  receiver.Stop();
  EXPECT_NE(call.Rest().status.error_code(), grpc::StatusCode::OK);
  engine_->HoldAfter(-1);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_LE(engine_->layers_run(), 3);
}

TEST_F(Push, ToAReceiverThatReadsNothingIsCutOff) {
  StartServer();
  FakeReceiver receiver;
  receiver.behaviour = FakeReceiver::Behaviour::kReadNothing;
  OpenStream call(*stub_, PromptTo(receiver, 40'000));
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_staged_bytes") >= 4 << 20; }));
  PassStallTimeouts();
  EXPECT_EQ(call.Rest().status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_TRUE(EverythingIsFree());
}

class SeveralPushes : public Push {
 protected:
  // Receiver i takes KV head i.
  v1::PrefillRequest PromptToBoth(int num_tokens) {
    v1::PrefillRequest request = PromptOf(num_tokens, "pushed");
    for (uint32_t i = 0; i < 2; ++i) {
      v1::Push& push = *request.add_pushes();
      push.mutable_deliver_to()->set_address(receivers_[i].address());
      push.mutable_deliver_to()->set_transfer_id(absl::StrCat("part-", i));
      push.mutable_layout()->set_first_head(i);
      push.mutable_layout()->set_num_heads(1);
      push.mutable_layout()->set_order(i == 0 ? v1::KV_ORDER_NHD : v1::KV_ORDER_NH2D);
    }
    return request;
  }
  static void ExpectWhole(FakeReceiver& receiver, uint32_t head) {
    const std::vector<v1::ReceiveRequest> messages = receiver.messages();
    ASSERT_FALSE(messages.empty());
    ASSERT_TRUE(messages.front().has_open());
    EXPECT_EQ(messages.front().open().transfer_id(), absl::StrCat("part-", head));
    const v1::KvLayout& layout = messages.front().open().layout();
    EXPECT_EQ(layout.first_head(), head);
    EXPECT_EQ(layout.num_heads(), 1);
    ASSERT_TRUE(messages.back().has_result());
    EXPECT_EQ(messages.back().result().pushes_size(), 0);
    std::vector<v1::KvFrame> frames;
    for (const auto& message : messages) {
      if (message.has_kv_frame()) frames.push_back(message.kv_frame());
    }
    EXPECT_EQ(messages.back().result().kv_frames(), frames.size());
    ExpectWholeCache(frames, layout);
  }
  double ReceiversThatEnded(const char* outcome) const {
    return Metric(absl::StrCat("prefilld_receivers_total{outcome=\"", outcome, "\"}"));
  }

  FakeReceiver receivers_[2];
};

TEST_F(SeveralPushes, BringEachReceiverItsHeadsOfOneComputation) {
  StartServer();
  const StreamContents contents = Prefill(PromptToBoth(5000));
  ASSERT_TRUE(contents.status.ok()) << contents.status.error_message();
  EXPECT_TRUE(contents.frames().empty());
  EXPECT_EQ(contents.events.front().accepted().receiver_key(), "");
  ASSERT_NE(contents.result(), nullptr);
  EXPECT_EQ(contents.result()->first_token().token_id(), 250);
  ASSERT_EQ(contents.result()->pushes_size(), 2);
  for (const v1::PushResult& push : contents.result()->pushes()) {
    EXPECT_EQ(push.code(), 0) << push.message();
    EXPECT_EQ(push.kv_bytes(), 4 * 313 * 2 * 16 * 64 * 2);
    EXPECT_GT(push.kv_frames(), 0);
  }
  EXPECT_EQ(contents.result()->kv_bytes(), 0);
  ExpectWhole(receivers_[0], 0);
  ExpectWhole(receivers_[1], 1);
  EXPECT_EQ(engine_->layers_run(), 4);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(ReceiversThatEnded("ok"), 2);
  EXPECT_EQ(Metric("prefilld_prompt_tokens_count"), 1);
}

TEST_F(SeveralPushes, OneThatFailsEndsAlone) {
  StartServer();
  receivers_[0].behaviour = FakeReceiver::Behaviour::kNobodyWaits;
  const StreamContents contents = Prefill(PromptToBoth(5000));
  ASSERT_TRUE(contents.status.ok()) << contents.status.error_message();
  ASSERT_EQ(contents.result()->pushes_size(), 2);
  EXPECT_EQ(contents.result()->pushes(0).code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_THAT(contents.result()->pushes(0).message(), HasSubstr(receivers_[0].address()));
  EXPECT_EQ(contents.result()->pushes(1).code(), 0);
  ExpectWhole(receivers_[1], 1);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(ReceiversThatEnded("receiver_failed"), 1);
  EXPECT_EQ(ReceiversThatEnded("ok"), 1);
}

TEST_F(SeveralPushes, OneThatReadsNothingEndsAlone) {
  StartServer();
  receivers_[1].behaviour = FakeReceiver::Behaviour::kReadNothing;
  OpenStream call(*stub_, PromptToBoth(40'000));
  // Every slot holds a layer for the one that reads nothing, and the other one has taken all
  // frames of these layers, so that nothing of its own is under way while time passes.
  constexpr int kFramesOfALayer = 10;  // 10.24 MB
  EXPECT_TRUE(Eventually([&] {
    return engine_->held() == engine_options_.kv_slots &&
           receivers_[0].frames_seen == kFramesOfALayer * engine_->layers_run();
  }));
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_staged_bytes") == 4 << 20; }));
  EXPECT_TRUE(PassStallTimeoutsUntil([&] { return ReceiversThatEnded("stalled") == 1; }));
  const StreamContents rest = call.Rest();
  ASSERT_NE(rest.result(), nullptr) << rest.status.error_message();
  EXPECT_EQ(rest.result()->pushes(0).code(), 0);
  EXPECT_EQ(rest.result()->pushes(1).code(), grpc::StatusCode::ABORTED);
  ExpectWhole(receivers_[0], 0);
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(SeveralPushes, ThatAllFailAreTheFailureOfTheRequest) {
  StartServer();
  for (FakeReceiver& receiver : receivers_) {
    receiver.behaviour = FakeReceiver::Behaviour::kNobodyWaits;
  }
  engine_->HoldAfter(1);
  const StreamContents contents = Prefill(PromptToBoth(5000));
  EXPECT_EQ(contents.status.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_THAT(contents.status.error_message(), HasSubstr(receivers_[0].address()));
  engine_->HoldAfter(-1);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_LT(engine_->layers_run(), 4);
  EXPECT_EQ(Metric("prefilld_requests_total{outcome=\"receiver_failed\"}"), 1);
}

TEST_F(SeveralPushes, EndWhenTheCallerCancels) {
  StartServer();
  engine_->HoldAfter(2);
  OpenStream call(*stub_, PromptToBoth(1000));
  EXPECT_TRUE(
      Eventually([&] { return receivers_[0].frames_seen + receivers_[1].frames_seen >= 4; }));
  call.Cancel();
  EXPECT_TRUE(Eventually([&] { return ReceiversThatEnded("cancelled") == 2; }));
  engine_->HoldAfter(-1);
  EXPECT_TRUE(Eventually([&] { return receivers_[0].running + receivers_[1].running == 0; }));
  EXPECT_TRUE(EverythingIsFree());
}

// A request that ends in the queue has called nobody.
TEST_F(SeveralPushes, ThatHaveNotBegunEndWithTheirRequest) {
  engine_options_.max_sequences = 1;
  StartServer();
  engine_->HoldAfter(0);
  OpenStream first(*stub_, PromptOf(1000));
  EXPECT_TRUE(Eventually([&] { return engine_->started() == 1; }));
  OpenStream call(*stub_, PromptToBoth(1000));
  call.ReadUntil(v1::PrefillEvent::kAccepted);
  call.Cancel();
  EXPECT_TRUE(Eventually([&] { return ReceiversThatEnded("cancelled") == 2; }));
  engine_->HoldAfter(-1);
  EXPECT_TRUE(first.Rest().status.ok());
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(receivers_[0].running + receivers_[1].running, 0);
}

TEST_F(Push, ASystemClockThatWasPutForwardIsNoTimeOut) {
  clock_.Advance(-absl::Hours(2));  // our clock is behind the system's
  StartServer();
  FakeReceiver receiver;
  OpenStream call(*stub_, PromptTo(receiver, 1000), absl::Now() + absl::Hours(1));
  EXPECT_NE(call.Rest().result(), nullptr);
}

TEST_F(Push, ToAReceiverThatNeverAnswersIsCutOff) {
  StartServer();
  FakeReceiver receiver;
  receiver.behaviour = FakeReceiver::Behaviour::kNeverAnswer;
  OpenStream call(*stub_, PromptTo(receiver, 1000));
  EXPECT_TRUE(Eventually([&] { return receiver.took_result(); }));
  PassStallTimeouts();
  EXPECT_EQ(call.Rest().status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_TRUE(Eventually([&] { return receiver.running == 0; }));
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(Push, LeavesTheReceiverWhenTheCallerCancelsBeforeItsAnswer) {
  StartServer();
  FakeReceiver receiver;
  receiver.behaviour = FakeReceiver::Behaviour::kNeverAnswer;
  OpenStream call(*stub_, PromptTo(receiver, 1000));
  EXPECT_TRUE(Eventually([&] { return receiver.took_result(); }));
  call.Cancel();
  EXPECT_TRUE(Eventually([&] { return receiver.running == 0; }));
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(Push, StopsWhenTheCallerCancels) {
  StartServer();
  FakeReceiver receiver;
  engine_->HoldAfter(2);
  OpenStream call(*stub_, PromptTo(receiver, 1000));
  EXPECT_TRUE(Eventually([&] { return receiver.frames_seen == 2; }));
  call.Cancel();
  EXPECT_TRUE(
      Eventually([&] { return Metric("prefilld_requests_total{outcome=\"cancelled\"}") == 1; }));
  engine_->HoldAfter(-1);
  EXPECT_TRUE(EverythingIsFree());
}

}  // namespace
}  // namespace prefilld::server
