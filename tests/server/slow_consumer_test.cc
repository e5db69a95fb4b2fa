// Tests consumers that are slow, and consumers whose socket nobody reads.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>

#include "absl/strings/str_cat.h"
#include "tests/server/lane_receiver.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;

constexpr absl::Duration kPatience = absl::Seconds(30);

sockaddr_in Loopback(int port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

sockaddr_un UnixSocket(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  return address;
}

// Stands between the ends of one connection, and reads from one of them as slowly as it is told.
class SlowReader {
 public:
  enum class From { kCaller, kCalled };

  // Calls `target`, a sockaddr_in or sockaddr_un, for whoever connects to port() or, if there is
  // one, to `path`.
  template <typename Address>
  explicit SlowReader(const Address& target, From slow = From::kCalled,
                      const std::string& path = "")
      : slow_(slow) {
    const auto* address_called = reinterpret_cast<const sockaddr*>(&target);
    called_ = socket(address_called->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const int buffer_bytes = 128 << 10;
    setsockopt(called_, SOL_SOCKET, SO_RCVBUF, &buffer_bytes, sizeof buffer_bytes);
    connect(called_, address_called, sizeof target);
    if (!path.empty()) {
      listener_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
      const sockaddr_un unix_address = UnixSocket(path);
      bind(listener_, reinterpret_cast<const sockaddr*>(&unix_address), sizeof unix_address);
      listen(listener_, 1);
      thread_ = std::thread([this] { Run(); });
      return;
    }
    listener_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(listener_, SOL_SOCKET, SO_RCVBUF, &buffer_bytes, sizeof buffer_bytes);
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
    const int caller = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
    const int fast_end = slow_ == From::kCaller ? called_ : caller;
    const int slow_end = slow_ == From::kCaller ? caller : called_;
    std::vector<char> bytes(32 << 10);  // few turns, because each may wait for a busy machine
    while (!stop_ && !broken_) {
      const int64_t rate = rate_;
      pollfd ends[2] = {
          {.fd = fast_end, .events = POLLIN, .revents = 0},
          {.fd = slow_end, .events = static_cast<short>(rate != 0 ? POLLIN : 0), .revents = 0}};
      poll(ends, 2, 20);
      if ((ends[0].revents & POLLIN) != 0) Forward(fast_end, slow_end, bytes);
      if ((ends[1].revents & (POLLHUP | POLLERR)) != 0 && rate == 0) broken_ = true;
      if ((ends[1].revents & POLLIN) == 0) continue;
      const int64_t size = Forward(slow_end, fast_end, bytes);
      if (rate > 0) {
        absl::SleepFor(absl::Seconds(static_cast<double>(size) / static_cast<double>(rate)));
      }
    }
    close(caller);
    close(called_);
  }

  int64_t Forward(int from, int to, std::vector<char>& bytes) {
    const ssize_t size = recv(from, bytes.data(), bytes.size(), 0);
    if (size <= 0 || send(to, bytes.data(), size, MSG_NOSIGNAL) != size) broken_ = true;
    return size;
  }

  const From slow_;
  int called_ = -1;
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
  SlowReader reader(Loopback(server_->port()));
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

TEST_F(SlowConsumer, OfAPushThatTakesBytesIsNotStalledEither) {
  options_.stall_timeout = absl::Seconds(1);
  options_.min_consumer_mb_per_s = 0;
  options_.deliver_to_allow = {"127.0.0.1:*"};
  StartServer();
  LaneReceiver receiver;
  SlowReader reader(Loopback(receiver.port()), SlowReader::From::kCaller);
  reader.set_bytes_per_second(400'000);
  v1::PrefillRequest request = PromptOf(4096);
  request.mutable_deliver_to()->set_address(absl::StrCat("127.0.0.1:", reader.port()));
  request.mutable_deliver_to()->set_transfer_id("t");
  request.set_num_lanes(1);
  OpenStream stream(*stub_, request);
  const absl::Time start = absl::Now();
  while (receiver.arrivals < 2 && absl::Now() - start < kPatience) {
    absl::SleepFor(absl::Milliseconds(20));
  }
  EXPECT_GT(absl::Now() - start, 4 * options_.stall_timeout);
  reader.set_bytes_per_second(-1);
  const grpc::Status status = stream.Rest().status;
  EXPECT_TRUE(status.ok()) << status.error_message();
}

// The server looks once a second how much a Unix socket still holds.
TEST_F(SlowConsumer, OfAUnixSocketThatTakesBytesIsNotStalledEither) {
  const std::string path = absl::StrCat(::testing::TempDir(), "slow_consumer.", getpid());
  options_.listen = absl::StrCat("unix:", path);
  options_.stall_timeout = absl::Seconds(5);
  options_.min_consumer_mb_per_s = 0;
  StartServer();
  SlowReader reader(UnixSocket(path));
  reader.set_bytes_per_second(139'000);
  const auto stub = Through(reader);
  OpenStream stream(*stub, PromptOf(4096));
  const absl::Time start = absl::Now();
  stream.ReadUntil(v1::PrefillEvent::kKvFrame);
  EXPECT_GT(absl::Now() - start, options_.stall_timeout + absl::Seconds(2));
  reader.set_bytes_per_second(-1);
  const grpc::Status status = stream.Rest().status;
  EXPECT_TRUE(status.ok()) << status.error_message();
}

// A frame takes more than twice the stall time-out.
TEST_F(SlowConsumer, OfAPushToAUnixSocketThatTakesBytesIsNotStalledEither) {
  const std::string path = absl::StrCat(::testing::TempDir(), "slow_receiver.", getpid());
  options_.stall_timeout = absl::Seconds(1);
  options_.min_consumer_mb_per_s = 0;
  options_.deliver_to_allow = {"unix:" + path};
  StartServer();
  LaneReceiver receiver;
  SlowReader reader(Loopback(receiver.port()), SlowReader::From::kCaller, path);
  reader.set_bytes_per_second(350'000);
  v1::PrefillRequest request = PromptOf(4096);
  request.mutable_deliver_to()->set_address("unix:" + path);
  request.mutable_deliver_to()->set_transfer_id("t");
  request.set_num_lanes(1);
  OpenStream stream(*stub_, request);
  const absl::Time start = absl::Now();
  while (receiver.arrivals < 1 && absl::Now() - start < kPatience) {
    absl::SleepFor(absl::Milliseconds(20));
  }
  EXPECT_GT(absl::Now() - start, 2 * options_.stall_timeout);
  reader.set_bytes_per_second(-1);
  const grpc::Status status = stream.Rest().status;
  EXPECT_TRUE(status.ok()) << status.error_message();
  unlink(path.c_str());
}

// The consumer is a process that is stopped, or one that is busy with other things. The kernel of
// its machine answers for it.
TEST_F(SlowConsumer, WhoseSocketNobodyReadsLosesOneRequestAndKeepsItsConnection) {
  options_.min_consumer_mb_per_s = 0;
  StartServer();
  engine_->HoldAfter(0);
  SlowReader reader(Loopback(server_->port()));
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
