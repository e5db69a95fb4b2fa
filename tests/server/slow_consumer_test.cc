// Tests consumers that are slow, and consumers whose socket nobody reads.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>

#include "absl/strings/str_cat.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;

sockaddr_in Loopback(int port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

// Stands between one connection of a client and the server, and reads the server's socket as slowly
// as it is told.
class SlowReader {
 public:
  explicit SlowReader(int server_port) : server_port_(server_port) {
    listener_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address = Loopback(0);
    socklen_t length = sizeof address;
    bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof address);
    listen(listener_, 1);
    getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &length);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this] { Run(); });
  }
  ~SlowReader() {
    stop_ = true;
    thread_.join();
    close(listener_);
  }

  int port() const { return port_; }
  // 0: nothing is read. Negative: as fast as it comes.
  void set_bytes_per_second(int64_t rate) { rate_ = rate; }
  bool broken() const { return broken_; }

 private:
  void Run() {
    pollfd waiting = {.fd = listener_, .events = POLLIN, .revents = 0};
    while (!stop_ && poll(&waiting, 1, 50) == 0) {
    }
    const int client = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
    const int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const int buffer_bytes = 128 << 10;
    setsockopt(server, SOL_SOCKET, SO_RCVBUF, &buffer_bytes, sizeof buffer_bytes);
    const sockaddr_in address = Loopback(server_port_);
    connect(server, reinterpret_cast<const sockaddr*>(&address), sizeof address);
    std::vector<char> bytes(8 << 10);
    while (!stop_ && !broken_) {
      const int64_t rate = rate_;
      pollfd ends[2] = {
          {.fd = client, .events = POLLIN, .revents = 0},
          {.fd = server, .events = static_cast<short>(rate != 0 ? POLLIN : 0), .revents = 0}};
      poll(ends, 2, 20);
      if ((ends[0].revents & POLLIN) != 0) Forward(client, server, bytes);
      if ((ends[1].revents & (POLLHUP | POLLERR)) != 0 && rate == 0) broken_ = true;
      if ((ends[1].revents & POLLIN) == 0) continue;
      const int64_t size = Forward(server, client, bytes);
      if (rate > 0) {
        absl::SleepFor(absl::Seconds(static_cast<double>(size) / static_cast<double>(rate)));
      }
    }
    close(client);
    close(server);
  }

  int64_t Forward(int from, int to, std::vector<char>& bytes) {
    const ssize_t size = recv(from, bytes.data(), bytes.size(), 0);
    if (size <= 0 || send(to, bytes.data(), size, MSG_NOSIGNAL) != size) broken_ = true;
    return size;
  }

  const int server_port_;
  int listener_ = -1;
  int port_ = 0;
  std::atomic<int64_t> rate_ = -1;
  std::atomic<bool> stop_ = false, broken_ = false;
  std::thread thread_;
};

class SlowConsumer : public ServerFixture {
 protected:
  static std::unique_ptr<v1::PrefillService::Stub> Through(const SlowReader& reader) {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(-1);
    return v1::PrefillService::NewStub(grpc::CreateCustomChannel(
        absl::StrCat("127.0.0.1:", reader.port()), grpc::InsecureChannelCredentials(), arguments));
  }
};

// A frame of 2 MiB takes five times the stall time-out.
TEST_F(SlowConsumer, ThatTakesBytesIsNotStalledHoweverLongAFrameTakes) {
  options_.stall_timeout = absl::Seconds(1);
  options_.min_consumer_mb_per_s = 0;
  StartServer();
  SlowReader reader(server_->port());
  reader.set_bytes_per_second(400'000);
  const auto stub = Through(reader);
  OpenStream stream(*stub, PromptOf(4096));
  const absl::Time start = absl::Now();
  stream.ReadUntil(v1::PrefillEvent::kKvFrame);
  stream.ReadUntil(v1::PrefillEvent::kKvFrame);
  EXPECT_GT(absl::Now() - start, 4 * options_.stall_timeout);
  reader.set_bytes_per_second(-1);
  const StreamContents rest = stream.Rest();
  EXPECT_TRUE(rest.status.ok()) << rest.status.error_message();
  EXPECT_NE(rest.result(), nullptr);
}

// The consumer is a process that is stopped, or one that is busy with other things. The kernel of
// its machine answers for it.
TEST_F(SlowConsumer, WhoseSocketNobodyReadsLosesOneRequestAndKeepsItsConnection) {
  options_.min_consumer_mb_per_s = 0;
  StartServer();
  engine_->HoldAfter(0);
  SlowReader reader(server_->port());
  const auto stub = Through(reader);
  OpenStream large(*stub, PromptOf(40'000));
  large.ReadUntil(v1::PrefillEvent::kAccepted);
  reader.set_bytes_per_second(0);
  absl::SleepFor(absl::Milliseconds(200));
  engine_->HoldAfter(-1);
  // With gRPC's own time-out of the socket the connection ended 12 to 15 s later.
  absl::SleepFor(absl::Seconds(17));
  EXPECT_FALSE(reader.broken());
  clock_.Advance(options_.stall_timeout + absl::Seconds(1));
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_running_requests") == 0; }));
  reader.set_bytes_per_second(-1);
  const grpc::Status status = large.Rest().status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ABORTED) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr("took nothing"));
  EXPECT_FALSE(reader.broken());
  OpenStream next(*stub, PromptOf(10));
  EXPECT_TRUE(next.Rest().status.ok());
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(Metric("prefilld_requests_total{outcome=\"stalled\"}"), 1);
}

}  // namespace
}  // namespace prefilld::server
