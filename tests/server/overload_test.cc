// Tests more work than the server takes: queue bounds, order, deadlines.
#include <gmock/gmock.h>

#include "absl/strings/str_cat.h"
#include "google/rpc/retry_info.pb.h"
#include "google/rpc/status.pb.h"
#include "server/prompt_speed.h"
#include "server/waiting_receivers.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;

class Overload : public ServerFixture {
 protected:
  // Starts a request that stops after its first `layers` layers.
  std::unique_ptr<OpenStream> RunHeld(const v1::PrefillRequest& request, int layers = 0) {
    engine_->HoldAfter(layers);
    auto call = std::make_unique<OpenStream>(*stub_, request);
    call->ReadUntil(v1::PrefillEvent::kAccepted);
    EXPECT_TRUE(Eventually([this] { return engine_->alive() == 1 && engine_->stopped() == 1; }));
    return call;
  }
  std::unique_ptr<OpenStream> Queue(const v1::PrefillRequest& request,
                                    absl::Time deadline = absl::InfiniteFuture()) {
    auto call = std::make_unique<OpenStream>(*stub_, request, deadline);
    call->ReadUntil(v1::PrefillEvent::kAccepted);
    return call;
  }
};

void ExpectQueueFull(const grpc::Status& status, const char* what) {
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(status.error_message(), HasSubstr(what));
  google::rpc::Status details;
  ASSERT_TRUE(details.ParseFromString(status.error_details()));
  EXPECT_EQ(details.code(), 8);
  ASSERT_EQ(details.details_size(), 1);
  google::rpc::RetryInfo retry;
  ASSERT_TRUE(details.details(0).UnpackTo(&retry));
  EXPECT_GE(retry.retry_delay().seconds(), 1);
  EXPECT_LE(retry.retry_delay().seconds(), 60);
}

TEST_F(Overload, RefusesWithRetryInfoWhenTheQueueIsFull) {
  options_.queue_capacity = 2;
  StartServer();
  const auto running = RunHeld(PromptOf(10));
  const auto first = Queue(PromptOf(10));
  const auto second = Queue(PromptOf(10));
  ExpectQueueFull(Prefill(PromptOf(10)).status, "2 requests wait; at most 2");
  EXPECT_EQ(Metric("prefilld_requests_total{outcome=\"queue_full\"}"), 1);

  engine_->HoldAfter(-1);
  for (const auto* call : {&running, &first, &second}) {
    EXPECT_NE((*call)->Rest().result(), nullptr);
  }
  EXPECT_TRUE(Prefill(PromptOf(10)).status.ok());
}

TEST_F(Overload, ServesOneAtATimeWithoutAQueue) {
  options_.queue_capacity = 0;
  StartServer();
  const auto running = RunHeld(PromptOf(10));
  ExpectQueueFull(Prefill(PromptOf(10)).status, "0 requests wait; at most 0");
  engine_->HoldAfter(-1);
  EXPECT_NE(running->Rest().result(), nullptr);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_TRUE(Prefill(PromptOf(10)).status.ok());
}

TEST_F(Overload, RefusesWithRetryInfoWhenTheTokenBudgetIsFull) {
  options_.max_queued_tokens = 1000;
  StartServer();
  const auto running = RunHeld(PromptOf(10));
  const auto longer_than_the_budget = Queue(PromptOf(1500));  // one may always wait
  ExpectQueueFull(Prefill(PromptOf(1)).status, "1500 tokens wait and 1 came; at most 1000");
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_queued_tokens") == 1500; }));
  longer_than_the_budget->Cancel();
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_queued_tokens") == 0; }));
  const auto fits = Queue(PromptOf(900));
  ExpectQueueFull(Prefill(PromptOf(101)).status, "900 tokens wait and 101 came");
}

TEST_F(Overload, RefusesTheIdOfARunningRequestUntilItIsOver) {
  StartServer();
  auto running = RunHeld(PromptOf(10, "twin"));
  const grpc::Status status = Prefill(PromptOf(10, "twin")).status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ALREADY_EXISTS);
  EXPECT_THAT(status.error_message(), HasSubstr("twin"));
  engine_->HoldAfter(-1);
  EXPECT_NE(running->Rest().result(), nullptr);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_TRUE(Prefill(PromptOf(10, "twin")).status.ok());
}

TEST_F(Overload, AnIdIsFreeAsSoonAsItsCallerHasTheEnd) {
  StartServer();
  for (int i = 0; i < 300; ++i) {
    const grpc::Status status = Prefill(PromptOf(3, "again")).status;
    ASSERT_TRUE(status.ok()) << i << ": " << status.error_message();
  }
}

// Without the end of the call, which a caller who has the result need not wait for.
TEST_F(Overload, AnIdIsFreeAsSoonAsItsCallerHasTheResult) {
  StartServer();
  std::vector<std::unique_ptr<OpenStream>> streams;
  for (int i = 0; i < 50; ++i) {
    streams.push_back(std::make_unique<OpenStream>(*stub_, PromptOf(3, "again")));
    streams.back()->ReadUntil(v1::PrefillEvent::kResult);
  }
}

// The layer that was under way is a long one.
TEST_F(Overload, AnIdIsFreeAsSoonAsItsCallWasCancelled) {
  StartServer();
  const auto running = RunHeld(PromptOf(10, "again"));
  running->Cancel();
  EXPECT_EQ(running->Rest().status.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_ended_requests_in_passes") == 1; }));
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_running_requests") == 0; }));
  OpenStream next(*stub_, PromptOf(10, "again"));
  next.ReadUntil(v1::PrefillEvent::kAccepted);
  engine_->HoldAfter(-1);
  EXPECT_TRUE(next.Rest().status.ok());
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_ended_requests_in_passes") == 0; }));
}

// Some calls are cancelled before their request is there, and those are nobody's.
TEST_F(Overload, ARequestThatIsCancelledWhileItWaitsForItsIdIsCountedAsThat) {
  StartServer();
  const auto running = RunHeld(PromptOf(10, "again"));
  const auto refusals = [this](const std::string& cause) {
    return Metric("prefilld_refusals_total{cause=\"" + cause + "\"}");
  };
  EXPECT_TRUE(Eventually([&] {
    OpenStream next(*stub_, PromptOf(10, "again"));
    absl::SleepFor(absl::Milliseconds(50));
    next.Cancel();
    EXPECT_EQ(next.Rest().status.error_code(), grpc::StatusCode::CANCELLED);
    return refusals("cancelled") > 0;
  }));
  EXPECT_EQ(refusals("invalid"), 0);
  engine_->HoldAfter(-1);
  EXPECT_TRUE(running->Rest().status.ok());
}

TEST_F(Overload, AReceiverThatIsOneTooManyToWaitForItsRequestIsRefusedAndCountedAsThat) {
  StartServer();
  constexpr size_t kStreams = 16;  // of a connection, which may have a few more
  std::unique_ptr<v1::PrefillService::Stub> stub;
  std::vector<std::unique_ptr<OpenStream>> waiting;
  const auto attach = [&](size_t number) {
    v1::AttachReceiverRequest request;
    request.set_request_id(absl::StrCat("awaited-", number));
    request.set_receiver_key("0123456789abcdef0123456789abcdef");
    request.set_receiver(1);
    request.set_num_tokens(10);
    if (number % kStreams == 0) stub = NewStub();
    return std::make_unique<OpenStream>(*stub, request);
  };
  const auto refused = [this] { return Metric("prefilld_refusals_total{cause=\"receivers\"}"); };
  for (size_t i = 0; i <= WaitingReceivers::kMaxWaiting; ++i) waiting.push_back(attach(i));
  EXPECT_TRUE(Eventually([&] { return refused() == 1; }));
  EXPECT_EQ(Metric("prefilld_refusals_total{cause=\"queue_full\"}"), 0);
}

// A cancel and the next request of the same caller are heard of in any order.
TEST_F(Overload, AnIdWhoseCancelIsOnItsWayIsWaitedFor) {
  StartServer();
  const auto running = RunHeld(PromptOf(10, "again"));
  OpenStream next(*NewStub(), PromptOf(10, "again"));
  absl::SleepFor(absl::Milliseconds(200));
  running->Cancel();
  next.ReadUntil(v1::PrefillEvent::kAccepted);
  engine_->HoldAfter(-1);
  EXPECT_TRUE(next.Rest().status.ok());
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(Metric("prefilld_requests_total{outcome=\"duplicate\"}"), 0);
}

TEST_F(Overload, AnIdIsNotTakenFromTheRequestThatHasIt) {
  StartServer();
  const auto running = RunHeld(PromptOf(10, "mine"));
  OpenStream impatient(*NewStub(), PromptOf(10, "mine"));
  impatient.Cancel();
  EXPECT_EQ(impatient.Rest().status.error_code(), grpc::StatusCode::CANCELLED);
  std::vector<std::unique_ptr<OpenStream>> strangers;
  for (int i = 0; i < 70; ++i) {  // more than wait for a name
    strangers.push_back(std::make_unique<OpenStream>(*stub_, PromptOf(10, "mine")));
  }
  for (const auto& stranger : strangers) {
    EXPECT_EQ(stranger->Rest().status.error_code(), grpc::StatusCode::ALREADY_EXISTS);
  }
  EXPECT_TRUE(
      Eventually([&] { return Metric("prefilld_requests_total{outcome=\"duplicate\"}") == 70; }));
  engine_->HoldAfter(-1);
  EXPECT_TRUE(running->Rest().status.ok());
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(Overload, ACancelledRequestStopsInsideItsLayer) {
  StartServer();
  engine_->set_layer_time(absl::Minutes(5));
  auto running = std::make_unique<OpenStream>(*stub_, PromptOf(10));
  running->ReadUntil(v1::PrefillEvent::kAccepted);
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_computing") == 1; }));
  running->Cancel();
  EXPECT_TRUE(Eventually([&] { return engine_->alive() == 0; }));
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(engine_->layers_run(), 0);
}

TEST_F(Overload, RunsInOrderOfArrival) {
  StartServer();
  const auto running = RunHeld(PromptOf(1));
  const auto second = Queue(PromptOf(2));
  const auto third = Queue(PromptOf(3));
  engine_->HoldAfter(-1);
  EXPECT_NE(third->Rest().result(), nullptr);  // the last one is done: so are the others
  EXPECT_EQ(engine_->last_tokens().size(), 3);
  EXPECT_EQ(engine_->started(), 3);
  EXPECT_NE(second->Rest().result(), nullptr);
  EXPECT_NE(running->Rest().result(), nullptr);
}

TEST_F(Overload, FreesThePlaceOfAQueuedRequestAtOnceWhenItIsCancelled) {
  options_.queue_capacity = 1;
  StartServer();
  const auto running = RunHeld(PromptOf(10));
  const auto queued = Queue(PromptOf(10));
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_queued_requests") == 1; }));
  queued->Cancel();
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_queued_requests") == 0; }));
  EXPECT_EQ(Metric("prefilld_requests_total{outcome=\"cancelled\"}"), 1);
  const auto next = Queue(PromptOf(10));
  EXPECT_EQ(engine_->started(), 1);
}

TEST_F(Overload, EndsAQueuedRequestAtItsDeadline) {
  StartServer();
  const auto running = RunHeld(PromptOf(10));
  const auto queued = Queue(PromptOf(10), absl::Now() + absl::Hours(1));
  clock_.Advance(absl::Hours(2));  // gRPC rounds long deadlines up
  const StreamContents rest = queued->Rest();
  EXPECT_EQ(rest.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_THAT(rest.status.error_message(), HasSubstr("before the first layer"));
  EXPECT_TRUE(
      Eventually([&] { return Metric("prefilld_requests_total{outcome=\"deadline\"}") == 1; }));
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_queued_requests") == 0; }));
  engine_->HoldAfter(-1);
  EXPECT_NE(running->Rest().result(), nullptr);
  EXPECT_EQ(engine_->started(), 1);
}

TEST_F(Overload, EndsARunningRequestBetweenTwoLayersAtItsDeadline) {
  StartServer();
  engine_->HoldAfter(2);
  OpenStream call(*stub_, PromptOf(10), absl::Now() + absl::Hours(1));
  EXPECT_TRUE(Eventually([&] { return engine_->layers_run() == 2; }));
  clock_.Advance(absl::Hours(2));  // gRPC rounds long deadlines up
  const StreamContents rest = call.Rest();
  EXPECT_EQ(rest.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_THAT(rest.status.error_message(), HasSubstr("after layer 2 of 4"));
  EXPECT_EQ(rest.result(), nullptr);
  engine_->HoldAfter(-1);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_LE(engine_->layers_run(), 3);  // the one that was under way
}

TEST_F(Overload, RefusesADeadlineThatIsOutOfReachOnceItKnowsItsSpeed) {
  StartServer();
  const auto with_deadline = [this](int num_tokens, absl::Duration time) {
    return OpenStream(*stub_, PromptOf(num_tokens), absl::Now() + time).Rest();
  };
  const auto refused = [&] { return Metric("prefilld_requests_total{outcome=\"deadline\"}"); };
  // No speed is known yet, so the request is tried.
  engine_->set_on_layer([this](int64_t) { clock_.Advance(absl::Seconds(4)); });
  EXPECT_EQ(with_deadline(20'000, absl::Seconds(12)).status.error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(engine_->started(), 1);
  EXPECT_TRUE(Eventually([&] { return refused() == 1; }));
  EXPECT_TRUE(EverythingIsFree());
  engine_->set_on_layer([this](int64_t) { clock_.Advance(absl::Seconds(1)); });
  for (int i = 0; i < PromptSpeed::kMinSamples; ++i) {
    EXPECT_TRUE(Prefill(PromptOf(2000)).status.ok());  // 4 s
  }
  const int started = engine_->started();
  const grpc::Status status = with_deadline(20'000, absl::Seconds(16)).status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_THAT(status.error_message(), HasSubstr("at the best speed of late the queue takes 0 and"));
  EXPECT_EQ(refused(), 2);
  EXPECT_EQ(engine_->started(), started);
  // The deadline can be met. The speed of shorter prompts is unknown, so the next request is tried.
  EXPECT_TRUE(with_deadline(2000, absl::Hours(1)).status.ok());
  EXPECT_EQ(with_deadline(1500, absl::Milliseconds(3200)).status.error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(Eventually([&] { return engine_->started() == started + 2; }));
}

TEST_F(Overload, ADeadlineCoversTheQueueToo) {
  StartServer();
  engine_->set_on_layer([this](int64_t) { clock_.Advance(absl::Seconds(1)); });
  for (int i = 0; i < PromptSpeed::kMinSamples; ++i) {
    EXPECT_TRUE(Prefill(PromptOf(2000)).status.ok());  // 4 s
  }
  const auto running = RunHeld(PromptOf(2000));
  std::vector<std::unique_ptr<OpenStream>> queued;
  for (int i = 0; i < 20; ++i) queued.push_back(Queue(PromptOf(2000)));  // 80 s
  const grpc::Status status =
      OpenStream(*stub_, PromptOf(2000), absl::Now() + absl::Seconds(20)).Rest().status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_THAT(status.error_message(), HasSubstr("the queue takes"));
  engine_->HoldAfter(-1);
}

TEST_F(Overload, ASystemClockThatWasPutBackIsNoTimeOut) {
  StartServer();
  clock_.Advance(absl::Hours(2));  // our clock is ahead of the system's now
  OpenStream call(*stub_, PromptOf(10), absl::Now() + absl::Hours(1));
  EXPECT_NE(call.Rest().result(), nullptr);
}

TEST_F(Overload, CountsADeadlineThatGrpcNoticesFirst) {
  StartServer();
  engine_->HoldAfter(1);
  OpenStream call(*stub_, PromptOf(10), absl::Now() + absl::Seconds(2));
  EXPECT_EQ(call.Rest().status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(
      Eventually([&] { return Metric("prefilld_requests_total{outcome=\"deadline\"}") == 1; }));
  engine_->HoldAfter(-1);
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(Overload, SendsProgressWhileARequestWaits) {
  StartServer();
  const auto running = RunHeld(PromptOf(10));
  const auto queued = Queue(PromptOf(10));
  clock_.Advance(absl::Seconds(6));
  const v1::Progress progress = queued->ReadUntil(v1::PrefillEvent::kProgress).progress();
  EXPECT_EQ(progress.queue_position(), 1);
  EXPECT_EQ(progress.layers_computed(), 0);
  EXPECT_GE(progress.elapsed_us(), 6'000'000);
}

}  // namespace
}  // namespace prefilld::server
