// Tests log-probabilities of a prompt: they are in the result if asked for, and their computation
// can be interrupted and observed as a layer's can.
#include <gmock/gmock.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>

#include "proto/process/log.h"
#include "server/prefill_work.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

v1::PrefillRequest GradedPromptOf(int num_tokens) {
  v1::PrefillRequest request = PromptOf(num_tokens);
  request.set_prompt_logprobs(true);
  return request;
}

using PromptLogprobs = ServerFixture;

TEST_F(PromptLogprobs, ComeWhenAskedFor) {
  StartServer();
  const StreamContents without = Prefill(PromptOf(5));
  ASSERT_NE(without.result(), nullptr);
  EXPECT_EQ(without.result()->prompt_logprobs_size(), 0);
  EXPECT_EQ(without.result()->logprobs_us(), 0);
  EXPECT_EQ(engine_->logprobs_parts(), 0);
  const StreamContents with = Prefill(GradedPromptOf(5));
  ASSERT_NE(with.result(), nullptr);
  EXPECT_THAT(with.result()->prompt_logprobs(), ElementsAre(0.0f, -1.0f, -2.0f, -3.0f));
  EXPECT_THAT(with.result()->best_logprobs(), ElementsAre(0.0f, -0.5f, -1.0f, -1.5f));
}

TEST_F(PromptLogprobs, TakeTimeThatResultAndLogTellApart) {
  static const bool logging = (process::InitLogging(process::LogFormat::kText), true);
  ASSERT_TRUE(logging);
  StartServer();
  engine_->HoldLogprobsAfter(1);
  testing::internal::CaptureStderr();
  OpenStream call(*stub_, GradedPromptOf(5));
  EXPECT_TRUE(
      Eventually([&] { return engine_->logprobs_parts() == 1 && engine_->stopped() == 1; }));
  clock_.Advance(absl::Seconds(7));
  engine_->HoldLogprobsAfter(-1);
  const StreamContents contents = call.Rest();
  ASSERT_NE(contents.result(), nullptr);
  EXPECT_GE(contents.result()->logprobs_us(), 7'000'000);
  EXPECT_LT(contents.result()->compute_us(), 7'000'000);
  EXPECT_TRUE(Prefill(PromptOf(5)).status.ok());
  EXPECT_TRUE(EverythingIsFree());
  const std::string log = testing::internal::GetCapturedStderr();
  EXPECT_THAT(log, HasSubstr("logprobs_ms=70"));
  EXPECT_EQ(log.find("logprobs_ms"), log.rfind("logprobs_ms")) << "of a request that did not ask";
}

// The largest result fits through a channel that has gRPC's default limit for messages.
TEST_F(PromptLogprobs, OfTheLongestPromptFitIntoAMessage) {
  StartServer();
  const auto stub = v1::PrefillService::NewStub(
      grpc::CreateChannel(address(), grpc::InsecureChannelCredentials()));
  v1::PrefillRequest request = GradedPromptOf(kMaxPromptLogprobsTokens);
  request.mutable_layout()->set_first_block(kMaxPromptLogprobsTokens / 16);  // no KV
  const StreamContents contents = OpenStream(*stub, request).Rest();
  ASSERT_NE(contents.result(), nullptr) << contents.status.error_message();
  EXPECT_EQ(contents.result()->prompt_logprobs_size(), kMaxPromptLogprobsTokens - 1);
}

TEST_F(PromptLogprobs, OfALongerPromptAreRefused) {
  StartServer();
  const StreamContents contents = Prefill(GradedPromptOf(kMaxPromptLogprobsTokens + 1));
  EXPECT_EQ(contents.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(contents.status.error_message(),
              AllOf(HasSubstr("prompt_logprobs"), HasSubstr("262145"), HasSubstr("262144")));
}

TEST_F(PromptLogprobs, AreNotComputedToTheEndForACallerWhoLeft) {
  StartServer();
  engine_->HoldLogprobsAfter(1);
  OpenStream call(*stub_, GradedPromptOf(10));
  EXPECT_TRUE(Eventually([&] { return engine_->logprobs_parts() == 1; }));
  call.Cancel();
  EXPECT_TRUE(
      Eventually([&] { return Metric("prefilld_requests_total{outcome=\"cancelled\"}") == 1; }));
  engine_->HoldLogprobsAfter(-1);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_LE(engine_->logprobs_parts(), 2);
  EXPECT_TRUE(server_->failure().ok());
  EXPECT_TRUE(Prefill(GradedPromptOf(10)).status.ok());
}

TEST_F(PromptLogprobs, AreNotBegunForARequestThatEndedWithItsLastLayer) {
  StartServer();
  engine_->set_logits_are_nan(true);
  EXPECT_EQ(Prefill(GradedPromptOf(10)).status.error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(engine_->logprobs_parts(), 0);
}

TEST_F(PromptLogprobs, EndAtTheDeadline) {
  StartServer();
  engine_->HoldLogprobsAfter(1);
  OpenStream call(*stub_, GradedPromptOf(10), absl::Now() + absl::Hours(1));
  EXPECT_TRUE(Eventually([&] { return engine_->logprobs_parts() == 1; }));
  clock_.Advance(absl::Hours(2));
  engine_->HoldLogprobsAfter(-1);
  const grpc::Status status = call.Rest().status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED) << status.error_message();
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_LE(engine_->logprobs_parts(), 2);
  EXPECT_TRUE(server_->failure().ok());
}

TEST_F(PromptLogprobs, ThatFailAreAFailureOfTheDevice) {
  StartServer();
  engine_->FailLogprobs(absl::InternalError("an illegal memory access"));
  const grpc::Status status = Prefill(GradedPromptOf(10)).status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(status.error_message(), HasSubstr("an illegal memory access"));
  EXPECT_EQ(server_->failure().code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(PromptLogprobs, AreProgressPartByPart) {
  StartServer();
  engine_->HoldLogprobsAfter(0);
  OpenStream graded(*stub_, GradedPromptOf(10));
  graded.ReadUntil(v1::PrefillEvent::kKvFrame);
  for (int part = 1; part <= 3; ++part) {
    engine_->HoldLogprobsAfter(part);
    ASSERT_TRUE(
        Eventually([&] { return engine_->logprobs_parts() == part && engine_->stopped() == 1; }));
    clock_.Advance(options_.wedge_timeout * 0.6);
    AwaitWatchdog();
    EXPECT_EQ(HealthOf("liveness"), "serving") << part;
  }
  clock_.Advance(options_.wedge_timeout * 1.1);
  EXPECT_TRUE(Eventually([&] { return HealthOf("liveness") == "not_serving"; }));
  engine_->HoldLogprobsAfter(-1);
  EXPECT_NE(graded.Rest().result(), nullptr);
}

}  // namespace
}  // namespace prefilld::server
