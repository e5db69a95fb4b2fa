#include "proto/wire/connections.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/process/health.h"
#include "proto/process/port_watch.h"
#include "proto/wire/channel.h"
#include "proto/wire/listener.h"

namespace prefilld::wire {
namespace {

using process::Answers;
using ::testing::HasSubstr;

std::unique_ptr<Listener> Serve(int64_t max_connections = 100) {
  auto listener = Listener::Create({.address = "127.0.0.1:0",
                                    .tls = {},
                                    .max_request_bytes = 1 << 20,
                                    .max_streams = 4,
                                    .max_connections = max_connections},
                                   {});
  EXPECT_TRUE(listener.ok()) << listener.status();
  return *std::move(listener);
}

Descriptor Dial(const Listener& listener) {
  Descriptor fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(listener.port()));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) return {};
  return fd;
}

bool Eventually(absl::FunctionRef<bool()> condition) {
  const absl::Time until = absl::Now() + absl::Seconds(30);
  while (absl::Now() < until) {
    if (condition()) return true;
    absl::SleepFor(absl::Milliseconds(10));
  }
  return condition();
}

// Reads to the end of the connection.
std::string ReadAll(const Descriptor& fd) {
  std::string all(1 << 16, '\0');
  size_t size = 0;
  ssize_t got = 0;
  while (size < all.size() && (got = read(fd.get(), &all[size], all.size() - size)) > 0) {
    size += static_cast<size_t>(got);
  }
  all.resize(size);
  return all;
}

// Lowers the process's limit of open files to what is open now and `more`.
class FewDescriptors {
 public:
  explicit FewDescriptors(int more) {
    getrlimit(RLIMIT_NOFILE, &before_);
    const Descriptor next(fcntl(0, F_DUPFD_CLOEXEC, 0));
    rlimit limit = before_;
    limit.rlim_cur = static_cast<rlim_t>(next.get() + more);
    setrlimit(RLIMIT_NOFILE, &limit);
  }
  ~FewDescriptors() { setrlimit(RLIMIT_NOFILE, &before_); }

 private:
  rlimit before_ = {};
};

TEST(Connections, AreAcceptedAgainAfterAMomentWithoutFileDescriptors) {
  const auto listener = Serve();
  ASSERT_TRUE(Answers(listener->connections().own_addresses().front(), absl::Seconds(30)));
  {
    // The clients take descriptors of this process, too: at some point accept finds none.
    const FewDescriptors few(6);
    std::vector<Descriptor> idle;
    for (int i = 0; i < 6; ++i) idle.push_back(Dial(*listener));
    EXPECT_TRUE(Eventually([&] { return listener->connections().counts().accept_errors > 0; }));
  }
  EXPECT_TRUE(Answers(listener->connections().own_addresses().front(), absl::Seconds(30)));
  EXPECT_TRUE(Eventually([&] { return listener->connections().counts().open == 0; }));
}

TEST(Connections, AreCountedUntilEitherSideEndsThem) {
  const auto listener = Serve();
  {
    std::vector<Descriptor> idle;
    for (int i = 0; i < 5; ++i) idle.push_back(Dial(*listener));
    EXPECT_TRUE(Eventually([&] { return listener->connections().counts().open == 5; }));
  }
  EXPECT_TRUE(Eventually([&] { return listener->connections().counts().open == 0; }));
  EXPECT_EQ(listener->connections().counts().accepted, 5);
}

TEST(Connections, AboveTheLimitAreToldWhyAndTheOthersAreServed) {
  const auto listener = Serve(/*max_connections=*/2);
  const auto first = OpenChannel({.address = listener->connections().own_addresses().front()});
  ASSERT_TRUE(
      (*first)->WaitForConnected(std::chrono::system_clock::now() + std::chrono::seconds(30)));
  const Descriptor second = Dial(*listener);
  ASSERT_TRUE(Eventually([&] { return listener->connections().counts().open == 2; }));

  const Descriptor third = Dial(*listener);
  EXPECT_THAT(ReadAll(third), HasSubstr("too many connections; at most 2"));
  EXPECT_EQ(listener->connections().counts().refused, 1);
  EXPECT_EQ((*first)->GetState(false), GRPC_CHANNEL_READY);
}

TEST(Connections, AGrpcClientAboveTheLimitLearnsTheReason) {
  const auto listener = Serve(/*max_connections=*/1);
  const Descriptor first = Dial(*listener);
  ASSERT_TRUE(Eventually([&] { return listener->connections().counts().open == 1; }));
  const auto channel = OpenChannel({.address = listener->connections().own_addresses().front()});
  grpc::GenericStub stub(*channel);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
  grpc::CompletionQueue queue;
  const grpc::ByteBuffer request;
  grpc::ByteBuffer response;
  grpc::Status status;
  const auto call =
      stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", request, &queue);
  call->StartCall();
  call->Finish(&response, &status, &queue);
  void* tag = nullptr;
  bool ok = false;
  ASSERT_TRUE(queue.Next(&tag, &ok));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr("too many connections; at most 1"));
}

TEST(Connections, AreFoundByTheNameThatGrpcGivesThem) {
  const auto listener = Serve();
  const Descriptor fd = Dial(*listener);
  sockaddr_in own = {};
  socklen_t length = sizeof own;
  getsockname(fd.get(), reinterpret_cast<sockaddr*>(&own), &length);
  const std::string peer = absl::StrCat("ipv4:127.0.0.1:", ntohs(own.sin_port));
  ASSERT_TRUE(Eventually([&] { return listener->connections().Find(peer) != nullptr; }));
  // The greeting of HTTP/2.
  EXPECT_TRUE(Eventually([&] { return listener->connections().Find(peer)->BytesTaken() > 0; }));
}

TEST(Connections, TheLimitIsLoweredToWhatTheDescriptorsAllow) {
  rlimit before = {};
  getrlimit(RLIMIT_NOFILE, &before);
  rlimit low = before;
  low.rlim_cur = 128;
  setrlimit(RLIMIT_NOFILE, &low);
  const auto fits = Connections::Bind("127.0.0.1:0", {.max_connections = 1000});
  low.rlim_cur = 70;
  setrlimit(RLIMIT_NOFILE, &low);
  const auto too_few = Connections::Bind("127.0.0.1:0", {.max_connections = 1000});
  setrlimit(RLIMIT_NOFILE, &before);
  ASSERT_TRUE(fits.ok()) << fits.status();
  EXPECT_EQ((*fits)->counts().limit, (128 - Connections::kReservedDescriptors) / 2);
  EXPECT_THAT(std::string(too_few.status().message()), HasSubstr("limit of 70 open files"));
}

// A socket that listens and never accepts, as a server whose acceptor died.
TEST(Answers, IsFalseForAPortThatNobodyAccepts) {
  const auto deaf = ListenOn("127.0.0.1:0");
  ASSERT_TRUE(deaf.ok()) << deaf.status();
  EXPECT_FALSE(Answers(deaf->own_addresses.front(), absl::Milliseconds(300)));
}

}  // namespace
}  // namespace prefilld::wire
