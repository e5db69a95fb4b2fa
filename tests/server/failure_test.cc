// Tests cancels, dead and stalled consumers, a failing device, drain, and what health says
// meanwhile.
#include <thread>

#include <gmock/gmock.h>

#include "absl/strings/str_cat.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;

class Failure : public ServerFixture {
 protected:
  // This prompt's KV is larger than what the sockets of an idle reader take in.
  v1::PrefillRequest LargePrompt() { return PromptOf(40'000); }
};

TEST_F(Failure, CancelStopsAtTheNextLayerAndFreesEverything) {
  StartServer();
  engine_->HoldAfter(2);
  OpenStream call(*stub_, LargePrompt());
  call.ReadUntil(v1::PrefillEvent::kKvFrame);
  call.Cancel();
  EXPECT_TRUE(
      Eventually([&] { return Metric("prefilld_requests_total{outcome=\"cancelled\"}") == 1; }));
  engine_->HoldAfter(-1);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_LE(engine_->layers_run(), 3);
  EXPECT_TRUE(Prefill(PromptOf(10)).status.ok());
}

TEST_F(Failure, AConnectionThatDiesIsACancel) {
  StartServer();
  engine_->HoldAfter(2);
  {
    const auto stub = NewStub();
    OpenStream call(*stub, LargePrompt());
    call.ReadUntil(v1::PrefillEvent::kKvFrame);
  }
  EXPECT_TRUE(
      Eventually([&] { return Metric("prefilld_requests_total{outcome=\"cancelled\"}") == 1; }));
  engine_->HoldAfter(-1);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_LE(engine_->layers_run(), 3);
}

TEST_F(Failure, AStalledConsumerIsCutOffAndOthersGoOn) {
  StartServer();
  const auto stub = NewStub();
  OpenStream stalled(*stub, LargePrompt());
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_staged_bytes") >= 4 << 20; }));
  // One request can hold at most half of the staging memory.
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_LE(Metric("prefilld_staged_bytes"), 4 << 20);

  EXPECT_NE(Prefill(PromptOf(100)).result(), nullptr) << "others need not wait for its end";
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_live_requests") == 1; }));
  EXPECT_TRUE(PassStallTimeoutsUntil(
      [&] { return Metric("prefilld_requests_total{outcome=\"stalled\"}") == 1; }));

  const StreamContents rest = stalled.Rest();
  EXPECT_EQ(rest.status.error_code(), grpc::StatusCode::ABORTED) << rest.status.error_message();
  EXPECT_THAT(rest.status.error_message(), HasSubstr("took nothing"));
  EXPECT_EQ(rest.result(), nullptr);
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(Failure, ASlowConsumerPausesTheComputeAndGetsEverything) {
  StartServer();
  OpenStream slow(*stub_, LargePrompt());
  const auto layout = slow.ReadUntil(v1::PrefillEvent::kAccepted).accepted().layout();
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_staged_bytes") >= 4 << 20; }));
  EXPECT_TRUE(Eventually([&] {
    return engine_->held() == engine_options_.kv_slots && Metric("prefilld_computing") == 0;
  }));
  absl::SleepFor(absl::Milliseconds(50));  // the next layer waits for a slot
  EXPECT_LT(engine_->layers_run(), 4);
  const StreamContents rest = slow.Rest();
  ASSERT_NE(rest.result(), nullptr);
  EXPECT_GT(rest.result()->stall_us(), 10'000);
  EXPECT_LE(rest.result()->stall_us(), rest.result()->compute_us());
  ExpectWholeCache(rest.frames(), layout);
  EXPECT_GT(Metric("prefilld_stall_seconds_total"), 0.01);
}

TEST_F(Failure, WaitingForAConsumerAfterTheLastLayerIsNoStall) {
  engine_options_.num_layers = 2;  // fewer than the KV slots: no layer waits
  StartServer();
  OpenStream slow(*stub_, LargePrompt());
  EXPECT_TRUE(Eventually([&] { return engine_->layers_run() == 2; }));
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_EQ(engine_->alive(), 1);
  const StreamContents rest = slow.Rest();
  ASSERT_NE(rest.result(), nullptr);
  EXPECT_LT(rest.result()->stall_us(), 10'000);
  EXPECT_LE(rest.result()->stall_us(), rest.result()->compute_us());
  EXPECT_LT(Metric("prefilld_stall_seconds_total"), 0.01);
}

TEST_F(Failure, ASlowConsumerIsCutOffWhenOthersWait) {
  engine_options_.max_sequences = 1;
  StartServer();
  const auto stub = NewStub();
  OpenStream slow(*stub, LargePrompt());
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_staged_bytes") >= 4 << 20; }));
  // The consumer takes a few frames every five seconds. It is never at a standstill.
  for (int i = 0; i < 10; ++i) {
    EXPECT_TRUE(TakeUntilNoticed(slow));
    clock_.Advance(absl::Seconds(5));
  }
  AwaitWatchdog();
  EXPECT_EQ(Metric("prefilld_live_requests"), 1);  // as long as nobody waits

  EXPECT_NE(Prefill(PromptOf(100)).result(), nullptr);
  const grpc::Status status = slow.Rest().status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ABORTED) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr("others wait; at least 50 MB/s after 30s"));
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(Metric("prefilld_requests_total{outcome=\"too_slow\"}"), 1);
}

TEST_F(Failure, OfTheDeviceEndsEveryRequestWithUnavailable) {
  StartServer();
  engine_->HoldAfter(0);
  OpenStream running(*stub_, PromptOf(10));
  EXPECT_TRUE(Eventually([&] { return engine_->started() == 1; }));
  OpenStream queued(*stub_, PromptOf(10));
  queued.ReadUntil(v1::PrefillEvent::kAccepted);
  EXPECT_EQ(HealthOf(""), "serving");
  engine_->FailFrom(0, absl::InternalError("an illegal memory access"));
  engine_->HoldAfter(-1);
  for (OpenStream* call : {&running, &queued}) {
    const grpc::Status status = call->Rest().status;
    EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
    EXPECT_THAT(status.error_message(), HasSubstr("an illegal memory access"));
  }
  EXPECT_EQ(server_->failure().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(Prefill(PromptOf(1)).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_TRUE(Eventually([&] { return HealthOf("") == "not_serving"; }));
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(Metric("prefilld_device_errors_total"), 1);
  EXPECT_EQ(Metric("prefilld_requests_total{outcome=\"device_failed\"}"), 2);
  EXPECT_EQ(engine_->started(), 1);
}

TEST_F(Failure, OfPackingIsAFailureOfTheDevice) {
  StartServer();
  engine_->FailPacking(absl::InternalError("copy failed"));
  EXPECT_EQ(Prefill(PromptOf(10)).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_FALSE(server_->failure().ok());
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(Failure, OfOnePromptsLogitsIsThatPromptsAlone) {
  StartServer();
  engine_->set_logits_are_nan(true);
  EXPECT_EQ(Prefill(PromptOf(10)).status.error_code(), grpc::StatusCode::INTERNAL);
  engine_->set_logits_are_nan(false);
  EXPECT_TRUE(Prefill(PromptOf(10)).status.ok());
  EXPECT_TRUE(server_->failure().ok());
}

TEST_F(Failure, ToProgressTurnsLivenessOffUntilThereIsProgressAgain) {
  StartServer();
  EXPECT_EQ(HealthOf("liveness"), "serving");
  // A long idle time is not a wedge.
  clock_.Advance(options_.wedge_timeout * 2);
  AwaitWatchdog();
  EXPECT_EQ(HealthOf("liveness"), "serving");

  engine_->HoldAfter(1);
  OpenStream call(*stub_, PromptOf(10));
  EXPECT_TRUE(Eventually([&] { return engine_->stopped() == 1; }));
  clock_.Advance(options_.wedge_timeout / 2);
  AwaitWatchdog();
  EXPECT_EQ(HealthOf("liveness"), "serving");
  clock_.Advance(options_.wedge_timeout);
  EXPECT_TRUE(Eventually([&] { return HealthOf("liveness") == "not_serving"; }));
  EXPECT_EQ(Metric("prefilld_live"), 0);
  EXPECT_EQ(Metric("prefilld_progressing"), 0);
  EXPECT_EQ(Metric("prefilld_reachable"), 1);
  engine_->HoldAfter(-1);
  EXPECT_NE(call.Rest().result(), nullptr);
  EXPECT_TRUE(Eventually([&] { return HealthOf("liveness") == "serving"; }));
}

TEST_F(Failure, NoneWhileDraining) {
  StartServer();
  EXPECT_EQ(HealthOf("prefill.v1.PrefillService"), "serving");
  EXPECT_EQ(HealthOf("unheard.of"), absl::StrCat("error ", grpc::StatusCode::NOT_FOUND));
  engine_->HoldAfter(1);
  OpenStream running(*stub_, PromptOf(10));
  running.ReadUntil(v1::PrefillEvent::kAccepted);
  OpenStream queued(*stub_, PromptOf(10));
  queued.ReadUntil(v1::PrefillEvent::kAccepted);

  EXPECT_EQ(Metric("prefilld_drain_seconds"), 0);
  EXPECT_EQ(Metric("prefilld_drain_timeout_seconds"),
            absl::ToDoubleSeconds(options_.drain_timeout));
  EXPECT_FALSE(server_->Drain(absl::Milliseconds(10)));
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_drain_seconds") > 0; }));
  EXPECT_EQ(HealthOf(""), "not_serving");
  EXPECT_EQ(HealthOf("prefill.v1.PrefillService"), "not_serving");
  EXPECT_EQ(HealthOf("liveness"), "serving");
  const grpc::Status refused = Prefill(PromptOf(1)).status;
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(refused.error_message(), HasSubstr("draining"));

  engine_->HoldAfter(-1);
  EXPECT_NE(running.Rest().result(), nullptr);
  EXPECT_NE(queued.Rest().result(), nullptr);
  EXPECT_TRUE(server_->Drain(absl::Seconds(10)));
}

TEST_F(Failure, ToFinishInTheDrainTimeEndsWithUnavailable) {
  StartServer();
  engine_->HoldAfter(1);
  OpenStream call(*stub_, PromptOf(10));
  call.ReadUntil(v1::PrefillEvent::kAccepted);
  EXPECT_FALSE(server_->Drain(absl::Milliseconds(10)));
  std::thread release([&] {
    EXPECT_EQ(call.Rest().status.error_code(), grpc::StatusCode::UNAVAILABLE);
    engine_->HoldAfter(-1);
  });
  server_.reset();
  release.join();
}

}  // namespace
}  // namespace prefilld::server
