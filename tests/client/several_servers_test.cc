// Tests a client of several servers, and of one whose name is gone for a while.
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <set>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/prefill_client.h"
#include "grpcpp/server_context.h"
#include "gtest/gtest.h"
#include "tests/client/scripted_server.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::AttachLaneRequest;
using ::prefill::v1::PrefillRequest;

class DroppingSink : public KvSink {
 public:
  absl::Status OnAccepted(const ::prefill::v1::Accepted&) override { return absl::OkStatus(); }
  absl::Status OnProgress(const ::prefill::v1::Progress&) override { return absl::OkStatus(); }
  absl::Status OnFrame(const wire::ReceivedFrame&) override { return absl::OkStatus(); }
};

absl::Status Prefill(PrefillClient& client, uint32_t num_lanes = 1) {
  DroppingSink sink;
  PrefillRequest request = SmallRequest();
  request.set_num_lanes(num_lanes);
  return client.Prefill(request, sink, {.deadline = absl::Now() + absl::Seconds(20)}).status();
}

grpc::Status SendAll(grpc::ServerContext&, const PrefillRequest& request, PrefillWriter& writer) {
  const bool two = request.num_lanes() == 2;
  writer.Write(AcceptedEvent(SmallLayout(), two ? 2 : 1));
  for (uint32_t layer = 0; layer < (two ? 1 : 3); ++layer) {
    writer.Write(FrameEvent(SmallLayout(), 0, layer, layer, 0, 3));
  }
  writer.Write(two ? ResultEvent({1, 2}) : ResultEvent({3}));
  return grpc::Status::OK;
}

grpc::Status SendLane(const AttachLaneRequest&, PrefillWriter& writer) {
  for (uint32_t i = 0; i < 2; ++i) writer.Write(FrameEvent(SmallLayout(), 1, i, i + 1, 0, 3));
  return grpc::Status::OK;
}

TEST(SeveralServers, TakeTheCallsInTurnWithAllTheirLanes) {
  ScriptedServer a(SendAll, SendLane), b(SendAll, SendLane);
  const auto client = PrefillClient::Create({}, {a.address(), b.address()});
  ASSERT_TRUE(client.ok()) << client.status();
  for (int call = 0; call < 6; ++call) {
    const absl::Status status = Prefill(**client, 2);
    EXPECT_TRUE(status.ok()) << status;
  }
  for (ScriptedServer* server : {&a, &b}) {
    const std::vector<std::string> peers = server->peers();
    EXPECT_EQ(peers.size(), 6) << "three calls of two lanes";
    EXPECT_EQ(std::set<std::string>(peers.begin(), peers.end()).size(), 2) << "one of each lane";
  }
}

TEST(SeveralServers, OneThatIsAwayOrDrainsPassesCallsOn) {
  ScriptedServer draining([](grpc::ServerContext&, const PrefillRequest&, PrefillWriter&) {
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "the server is draining");
  });
  ScriptedServer serving(SendAll);
  const auto client =
      PrefillClient::Create({}, {"127.0.0.1:1", draining.address(), serving.address()});
  ASSERT_TRUE(client.ok()) << client.status();
  for (int call = 0; call < 6; ++call) {
    const absl::Status status = Prefill(**client);
    EXPECT_TRUE(status.ok()) << status;
  }
  EXPECT_EQ(serving.peers().size(), 6);
  EXPECT_GE(draining.peers().size(), 2);
}

TEST(SeveralServers, ACallThatWasAcceptedIsNotMadeAgain) {
  ScriptedServer breaking([](grpc::ServerContext&, const PrefillRequest&, PrefillWriter& writer) {
    writer.Write(AcceptedEvent(SmallLayout(), 1));
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "the device failed");
  });
  ScriptedServer idle(SendAll);
  const auto client = PrefillClient::Create({}, {breaking.address(), idle.address()});
  ASSERT_TRUE(client.ok()) << client.status();
  EXPECT_EQ(Prefill(**client).code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(idle.peers().empty());
}

TEST(SeveralServers, NoneIsAnError) {
  EXPECT_EQ(PrefillClient::Create({}, {}).status().code(), absl::StatusCode::kInvalidArgument);
}

// A name server that knows no name until it is told to; then each name is 127.0.0.1.
class NameServer {
 public:
  NameServer() : socket_(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in self = {};
    self.sin_family = AF_INET;
    self.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(self);
    EXPECT_EQ(bind(socket_, reinterpret_cast<sockaddr*>(&self), size), 0);
    EXPECT_EQ(getsockname(socket_, reinterpret_cast<sockaddr*>(&self), &size), 0);
    port_ = ntohs(self.sin_port);
    const timeval poll = {.tv_sec = 0, .tv_usec = 50'000};
    setsockopt(socket_, SOL_SOCKET, SO_RCVTIMEO, &poll, sizeof(poll));
    thread_ = std::thread([this] { Run(); });
  }
  ~NameServer() {
    stop_ = true;
    thread_.join();
    close(socket_);
  }

  int port() const { return port_; }
  std::atomic<bool> knows_names = false;

 private:
  void Run() {
    while (!stop_) {
      std::string message(512, '\0');
      sockaddr_in peer = {};
      socklen_t size = sizeof(peer);
      const ssize_t length = recvfrom(socket_, message.data(), message.size(), 0,
                                      reinterpret_cast<sockaddr*>(&peer), &size);
      if (length < 17) continue;
      message.resize(static_cast<size_t>(length));
      message = Answer(message);
      sendto(socket_, message.data(), message.size(), 0, reinterpret_cast<sockaddr*>(&peer), size);
    }
  }

  // Answers a question of 12 bytes of header, the name, its type and class (RFC 1035). Whatever
  // follows the question is left out.
  std::string Answer(std::string message) const {
    size_t end = 12;
    while (end < message.size() && message[end] != '\0') end += 1 + message[end];
    end += 5;
    message.resize(end);
    const bool asks_ipv4 = message[end - 4] == 0 && message[end - 3] == 1;
    const bool answers = knows_names && asks_ipv4;
    const char header[] = {'\x81', static_cast<char>(knows_names ? 0 : 3),  // 3: no such name
                           0,      1,
                           0,      static_cast<char>(answers ? 1 : 0),
                           0,      0,
                           0,      0};
    message.replace(2, sizeof(header), header, sizeof(header));
    // The name of the question, type A, class IN, for 0 seconds, 4 bytes: 127.0.0.1.
    constexpr char kRecord[] = "\xc0\x0c\0\1\0\1\0\0\0\0\0\4\x7f\0\0\1";
    if (answers) message.append(kRecord, sizeof(kRecord) - 1);
    return message;
  }

  const int socket_;
  int port_ = 0;
  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

// While a server restarts its name may lead nowhere. gRPC's pauses between look-ups that fail grow
// to 2 minutes.
TEST(NameThatIsGone, IsLookedUpAgainSoonAfterItsReturn) {
  ScriptedServer server(SendAll);
  NameServer names;
  const std::string port = server.address().substr(server.address().rfind(':'));
  const auto client = PrefillClient::Create(
      {.address = absl::StrCat("dns://127.0.0.1:", names.port(), "/prefill.test", port)});
  ASSERT_TRUE(client.ok()) << client.status();
  const absl::Time back = absl::Now() + absl::Seconds(13);
  while (absl::Now() < back) {
    EXPECT_EQ(Prefill(**client).code(), absl::StatusCode::kUnavailable);
    absl::SleepFor(absl::Milliseconds(100));
  }
  names.knows_names = true;
  absl::Status status = absl::UnavailableError("");
  while (!status.ok() && absl::Now() < back + absl::Seconds(4)) {
    absl::SleepFor(absl::Milliseconds(100));
    status = Prefill(**client);
  }
  EXPECT_TRUE(status.ok()) << status;
}

}  // namespace
}  // namespace prefilld::client
