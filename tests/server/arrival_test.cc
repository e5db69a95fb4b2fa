// Tests requests that are sent in part: they end in time, whatever they ask for.
#include <string>
#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <grpcpp/channel.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;

// A call that begins with its headers, and goes on as the test says.
class PartialCall final : public grpc::ClientBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer> {
 public:
  PartialCall(const std::shared_ptr<grpc::Channel>& channel, const std::string& method)
      : stub_(channel) {
    stub_.PrepareBidiStreamingCall(&context_, method, {}, this);
    AddHold();
    StartRead(&response_);
    StartCall();
  }
  ~PartialCall() override {
    context_.TryCancel();
    (void)Wait();
  }

  // Sends the request, and does not say that nothing follows.
  void Send(const std::string& bytes) {
    const grpc::Slice slice(bytes);
    request_ = grpc::ByteBuffer(&slice, 1);
    StartWrite(&request_);
  }
  // Waits for that many answers in all. False: the call ended before.
  bool Answers(size_t count) {
    absl::MutexLock lock(&mu_);
    const auto there = [&]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
      return reading_ended_ || answers_.size() >= count;
    };
    mu_.Await(absl::Condition(&there));
    return answers_.size() >= count;
  }
  std::string answer(size_t position) {
    absl::MutexLock lock(&mu_);
    return answers_.at(position);
  }
  grpc::Status Wait() {
    if (!std::exchange(released_, true)) RemoveHold();
    done_.WaitForNotification();
    return status_;
  }

 private:
  void OnReadDone(bool ok) override {
    {
      absl::MutexLock lock(&mu_);
      reading_ended_ = !ok;
      grpc::Slice bytes;
      if (ok && response_.DumpToSingleSlice(&bytes).ok()) {
        answers_.emplace_back(bytes.begin(), bytes.end());
      }
    }
    if (ok) StartRead(&response_);
  }
  void OnDone(const grpc::Status& status) override {
    status_ = status;
    done_.Notify();
  }

  grpc::GenericStub stub_;
  grpc::ClientContext context_;
  grpc::ByteBuffer request_, response_;
  grpc::Status status_;
  bool released_ = false;
  absl::Notification done_;

  absl::Mutex mu_;
  std::vector<std::string> answers_ ABSL_GUARDED_BY(mu_);
  bool reading_ended_ ABSL_GUARDED_BY(mu_) = false;
};

class Arrival : public ServerFixture {
 protected:
  std::shared_ptr<grpc::Channel> Channel() const {
    return grpc::CreateChannel(address(), grpc::InsecureChannelCredentials());
  }
};

TEST_F(Arrival, OfEveryMethodEndsInTime) {
  options_.stall_timeout = absl::Seconds(1);
  StartServer();
  const auto channel = Channel();
  constexpr const char* kMethods[] = {
      "/prefill.v1.PrefillService/Prefill",
      "/prefill.v1.PrefillService/AttachLane",
      "/prefill.v1.PrefillService/AttachReceiver",
      "/prefill.v1.PrefillService/GetServerInfo",
      "/grpc.health.v1.Health/Check",
      "/grpc.health.v1.Health/Watch",
      "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"};
  const absl::Time start = absl::Now();
  std::vector<std::unique_ptr<PartialCall>> calls;
  for (const char* method : kMethods) {
    calls.push_back(std::make_unique<PartialCall>(channel, method));
  }
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_requests_arriving") == 7; }));
  for (size_t i = 0; i < calls.size(); ++i) {
    const grpc::Status status = calls[i]->Wait();
    EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED) << kMethods[i];
    EXPECT_THAT(status.error_message(), HasSubstr("did not arrive within 5s")) << kMethods[i];
  }
  EXPECT_GE(absl::Now() - start, absl::Seconds(5));
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_requests_late_total") == 7; }));
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_requests_arriving") == 0; }));
  // None of them reached a service.
  EXPECT_EQ(Metric("prefilld_requests_total{outcome=\"invalid\"}"), 0);
  EXPECT_TRUE(Prefill(PromptOf(10)).status.ok());
}

// A request is whole when its message is, whether or not its caller ends the stream. From then on
// it may take as long as it likes.
TEST_F(Arrival, EndsWithTheMessage) {
  options_.stall_timeout = absl::Seconds(1);
  StartServer();
  engine_->HoldAfter(0);
  const auto channel = Channel();
  PartialCall prefill(channel, "/prefill.v1.PrefillService/Prefill");
  PartialCall info(channel, "/prefill.v1.PrefillService/GetServerInfo");
  PartialCall health(channel, "/grpc.health.v1.Health/Check");
  PartialCall watch(channel, "/grpc.health.v1.Health/Watch");
  prefill.Send(PromptOf(10).SerializeAsString());
  info.Send("");
  health.Send(std::string("\n\x08liveness"));
  watch.Send("");
  EXPECT_TRUE(prefill.Answers(1));
  EXPECT_TRUE(info.Answers(1));
  EXPECT_TRUE(health.Answers(1));
  EXPECT_TRUE(watch.Answers(1));
  EXPECT_TRUE(info.Wait().ok());
  EXPECT_TRUE(health.Wait().ok());
  absl::SleepFor(absl::Seconds(7));
  EXPECT_EQ(Metric("prefilld_requests_late_total"), 0);
  EXPECT_EQ(Metric("prefilld_running_requests"), 1);
  engine_->HoldAfter(-1);
}

TEST_F(Arrival, OfACancelledCallReachesNoService) {
  StartServer();
  {
    PartialCall call(Channel(), "/prefill.v1.PrefillService/Prefill");
    EXPECT_TRUE(Eventually([&] { return Metric("prefilld_requests_arriving") == 1; }));
  }
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_requests_arriving") == 0; }));
  EXPECT_EQ(Metric("prefilld_requests_total{outcome=\"invalid\"}"), 0);
  EXPECT_TRUE(EverythingIsFree());
}

// 40 requests do not come, of which 32 are read. The rest wait for their turn, as does a caller
// with a connection of its own, for whom one of the many makes room.
TEST_F(Arrival, OfManyAtOnceLeavesRoomForOthers) {
  options_.stall_timeout = absl::Seconds(1);
  engine_options_.max_tokens = 4096;  // so that requests are small
  StartServer();
  const auto channel = Channel();
  std::vector<std::unique_ptr<PartialCall>> calls;
  for (int i = 0; i < 40; ++i) {
    calls.push_back(
        std::make_unique<PartialCall>(channel, "/prefill.v1.PrefillService/GetServerInfo"));
  }
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_requests_arriving") == 40; }));
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  PartialCall other(
      grpc::CreateCustomChannel(address(), grpc::InsecureChannelCredentials(), arguments),
      "/prefill.v1.PrefillService/GetServerInfo");
  other.Send("");
  EXPECT_TRUE(other.Answers(1));
  EXPECT_TRUE(other.Wait().ok());
  EXPECT_GE(Metric("prefilld_requests_arriving"), 1);

  int made_room = 0, late = 0;
  for (const auto& call : calls) {
    const grpc::Status status = call->Wait();
    made_room += status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED ? 1 : 0;
    late += status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED ? 1 : 0;
    if (status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED) {
      EXPECT_THAT(status.error_message(), HasSubstr("32 requests arrive at once"));
    }
  }
  EXPECT_GE(made_room, 8);
  EXPECT_LE(made_room, 9);
  EXPECT_EQ(made_room + late, 40);
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_requests_arriving") == 0; }));
}

// kUnknown is what Watch says of a service that it does not know, as the protocol wants it.
TEST_F(Arrival, AWatchOfHealthSeesTheDrain) {
  const std::string kServing = "\x08\x01", kNotServing = "\x08\x02", kUnknown = "\x08\x03";
  StartServer();
  PartialCall watch(Channel(), "/grpc.health.v1.Health/Watch");
  watch.Send(std::string("\n\x19prefill.v1.PrefillService"));
  ASSERT_TRUE(watch.Answers(1));
  EXPECT_EQ(watch.answer(0), kServing);
  PartialCall stranger(Channel(), "/grpc.health.v1.Health/Watch");
  stranger.Send(std::string("\n\x06nobody"));
  ASSERT_TRUE(stranger.Answers(1));
  EXPECT_EQ(stranger.answer(0), kUnknown);
  EXPECT_EQ(HealthOf("prefill.v1.PrefillService"), "serving");
  EXPECT_EQ(HealthOf("nobody"), "error 5");  // NOT_FOUND
  EXPECT_TRUE(server_->Drain(absl::Seconds(5)));
  ASSERT_TRUE(watch.Answers(2));
  EXPECT_EQ(watch.answer(1), kNotServing);
  EXPECT_EQ(HealthOf("prefill.v1.PrefillService"), "not_serving");
  EXPECT_EQ(HealthOf("liveness"), "serving");
}

class OpenStreams : public ServerFixture {};

TEST_F(OpenStreams, AreCountedOfAllConnectionsAndOfTheOneWithTheMost) {
  StartServer();
  engine_->HoldAfter(0);
  const auto one = NewStub(), other = NewStub();
  std::vector<std::unique_ptr<OpenStream>> streams;
  for (int i = 0; i < 3; ++i) streams.push_back(std::make_unique<OpenStream>(*one, PromptOf(10)));
  streams.push_back(std::make_unique<OpenStream>(*other, PromptOf(10)));
  for (const auto& stream : streams) stream->ReadUntil(v1::PrefillEvent::kAccepted);
  const auto counts = [this](double all, double most) {
    return Eventually([&] {
      return Metric("prefilld_open_streams") == all &&
             Metric("prefilld_open_streams_of_one_connection") == most;
    });
  };
  EXPECT_TRUE(counts(4, 3));
  streams.pop_back();
  streams.pop_back();
  EXPECT_TRUE(counts(2, 2));
  engine_->HoldAfter(-1);
  for (const auto& stream : streams) EXPECT_TRUE(stream->Rest().status.ok());
  EXPECT_TRUE(counts(0, 0));
}

}  // namespace
}  // namespace prefilld::server
