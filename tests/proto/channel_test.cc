#include "proto/wire/channel.h"

#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <memory>
#include <string>

#include <gmock/gmock.h>
#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "prefill/v1/receiver.grpc.pb.h"
#include "proto/wire/listener.h"

namespace prefilld::wire {
namespace {

namespace v1 = ::prefill::v1;

// A receiver that reads to the end and says nothing meanwhile.
class SilentReceiver final : public v1::KvReceiver::Service {
 public:
  grpc::Status Receive(grpc::ServerContext* context,
                       grpc::ServerReader<v1::ReceiveRequest>* requests,
                       v1::ReceiveResponse* response) override {
    v1::ReceiveRequest request;
    while (requests->Read(&request)) {
    }
    return grpc::Status::OK;
  }
};

// gRPC pings once a second at most, and its servers end a connection at the fourth ping.
TEST(OpenPushChannel, ALongLayerDoesNotEndThePushToAServerWithDefaultPingLimits) {
  SilentReceiver receiver;
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&receiver);
  const auto server = builder.BuildAndStart();
  ASSERT_NE(server, nullptr);

  const auto channel =
      OpenPushChannel(absl::StrCat("127.0.0.1:", port), grpc::InsecureChannelCredentials(),
                      {.use_proxy = false, .silence = absl::Seconds(1)});
  const auto stub = v1::KvReceiver::NewStub(channel);
  grpc::ClientContext context;
  v1::ReceiveResponse response;
  const auto call = stub->Receive(&context, &response);
  ASSERT_TRUE(call->Write(v1::ReceiveRequest()));
  absl::SleepFor(absl::Seconds(7));
  call->WritesDone();
  const grpc::Status status = call->Finish();
  EXPECT_TRUE(status.ok()) << status.error_message();
}

// Serves reflection and health alone, which is enough to connect to.
absl::StatusOr<std::unique_ptr<Listener>> ListenAt(const std::string& address) {
  return Listener::Create(
      {.address = address, .tls = {}, .max_request_bytes = 1 << 20, .max_streams = 4}, {});
}

bool Connects(const ChannelOptions& options, absl::Duration timeout) {
  const auto channel = OpenChannel(options);
  return channel.ok() && (*channel)->WaitForConnected(absl::ToChronoTime(absl::Now() + timeout));
}

// gRPC's own pauses would have grown to 6 seconds or more by then, and grow to 2 minutes.
TEST(OpenChannel, FindsAServerThatWasAwaySoonAfterItsReturn) {
  auto listener = ListenAt("127.0.0.1:0");
  ASSERT_TRUE(listener.ok()) << listener.status();
  const std::string address = absl::StrCat("127.0.0.1:", (*listener)->port());
  listener->reset();

  const auto channel = *OpenChannel({.address = address});
  const absl::Time back = absl::Now() + absl::Seconds(13);
  EXPECT_FALSE(channel->WaitForConnected(absl::ToChronoTime(back)));
  const auto again = ListenAt(address);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(channel->WaitForConnected(absl::ToChronoTime(back + absl::Seconds(4))));
}

class ProxyVariables : public ::testing::TestWithParam<const char*> {
 protected:
  // Nothing listens at port 9.
  ProxyVariables() { setenv(GetParam(), "http://127.0.0.1:9", 1); }
  ~ProxyVariables() override { unsetenv(GetParam()); }
};

TEST_P(ProxyVariables, AreIgnoredUnlessWanted) {
  const auto listener = ListenAt("127.0.0.1:0");
  ASSERT_TRUE(listener.ok()) << listener.status();
  const std::string address = absl::StrCat("127.0.0.1:", (*listener)->port());
  EXPECT_TRUE(Connects({.address = address}, absl::Seconds(10)));
  EXPECT_FALSE(Connects({.address = address, .use_proxy = true}, absl::Seconds(1)));
  const auto push = [&address](bool use_proxy, absl::Duration timeout) {
    return OpenPushChannel(address, grpc::InsecureChannelCredentials(), {.use_proxy = use_proxy})
        ->WaitForConnected(absl::ToChronoTime(absl::Now() + timeout));
  };
  EXPECT_TRUE(push(false, absl::Seconds(10)));
  EXPECT_FALSE(push(true, absl::Seconds(1)));
}

INSTANTIATE_TEST_SUITE_P(All, ProxyVariables,
                         ::testing::Values("grpc_proxy", "https_proxy", "http_proxy"));

TEST(UnixSocket, IsServedBesideAPortAndDialled) {
  const std::string socket = absl::StrCat("unix:", ::testing::TempDir(), "prefilld-", getpid());
  const auto listener = ListenAt(absl::StrCat(socket, ",127.0.0.1:0"));
  ASSERT_TRUE(listener.ok()) << listener.status();
  EXPECT_TRUE(Connects({.address = socket}, absl::Seconds(10)));
  EXPECT_TRUE(
      Connects({.address = absl::StrCat("127.0.0.1:", (*listener)->port())}, absl::Seconds(10)));
  EXPECT_TRUE(OpenPushChannel(socket, grpc::InsecureChannelCredentials())
                  ->WaitForConnected(absl::ToChronoTime(absl::Now() + absl::Seconds(10))));

  const absl::Status second = ListenAt(socket).status();
  EXPECT_EQ(second.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.message()), ::testing::HasSubstr("another process serves it"));
  EXPECT_TRUE(Connects({.address = socket}, absl::Seconds(10)));
}

TEST(UnixSocket, ThatAProcessLeftBehindIsReplaced) {
  const std::string path = absl::StrCat(::testing::TempDir(), "prefilld-left-", getpid());
  sockaddr_un self = {};
  self.sun_family = AF_UNIX;
  path.copy(self.sun_path, sizeof(self.sun_path) - 1);
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&self), sizeof(self)), 0);
  close(fd);
  const auto listener = ListenAt("unix:" + path);
  ASSERT_TRUE(listener.ok()) << listener.status();
  EXPECT_EQ((*listener)->port(), 0);
  EXPECT_TRUE(Connects({.address = "unix:" + path}, absl::Seconds(10)));
}

}  // namespace
}  // namespace prefilld::wire
