#include "proto/wire/socket_use.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/time/clock.h"
#include "proto/wire/listening_sockets.h"

namespace prefilld::wire {
namespace {

using ::testing::Eq;
using ::testing::Optional;

// Both ends of a TCP connection in this process.
struct Ends {
  Descriptor sender, receiver;
  std::string receiver_name;  // as the sender's peer
};

Ends Connect() {
  sockaddr_storage address = {};
  auto& v4 = reinterpret_cast<sockaddr_in&>(address);
  v4.sin_family = AF_INET;
  v4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof v4;
  const Descriptor listener(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  bind(listener.get(), reinterpret_cast<sockaddr*>(&address), length);
  listen(listener.get(), 1);
  getsockname(listener.get(), reinterpret_cast<sockaddr*>(&address), &length);
  Ends ends;
  ends.sender = Descriptor(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  EXPECT_EQ(connect(ends.sender.get(), reinterpret_cast<sockaddr*>(&address), length), 0);
  ends.receiver = Descriptor(accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
  ends.receiver_name = PeerName(address);
  return ends;
}

void Write(const Descriptor& fd, size_t size) {
  const std::string bytes(size, 'x');
  ASSERT_EQ(send(fd.get(), bytes.data(), size, MSG_NOSIGNAL), static_cast<ssize_t>(size));
}

TEST(PeerName, IsWrittenAsGrpcDoes) {
  sockaddr_storage address = {};
  auto& v6 = reinterpret_cast<sockaddr_in6&>(address);
  v6.sin6_family = AF_INET6;
  v6.sin6_port = htons(50051);
  inet_pton(AF_INET6, "::ffff:10.1.2.3", &v6.sin6_addr);
  EXPECT_EQ(PeerName(address), "ipv4:10.1.2.3:50051");
  inet_pton(AF_INET6, "fd00::1", &v6.sin6_addr);
  EXPECT_EQ(PeerName(address), "ipv6:%5Bfd00::1%5D:50051");
  address.ss_family = AF_UNIX;
  EXPECT_EQ(PeerName(address), "");
}

TEST(SocketsToPeer, CountWhatThePeerHasTakenSinceTheyWereFound) {
  const absl::Time now = absl::Now();
  SocketsToPeer sockets;
  EXPECT_EQ(sockets.BytesTaken("ipv4:127.0.0.1:1", now), std::nullopt);
  const Ends ends = Connect();
  Write(ends.sender, 1000);
  EXPECT_EQ(sockets.BytesTaken(ends.receiver_name, now), std::nullopt)
      << "it looks but now and then";
  EXPECT_THAT(sockets.BytesTaken(ends.receiver_name, now + absl::Seconds(1)), Optional(Eq(0)));
  Write(ends.sender, 3000);
  const absl::Time until = absl::Now() + absl::Seconds(10);
  while (sockets.BytesTaken(ends.receiver_name, now) < 3000 && absl::Now() < until) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  EXPECT_THAT(sockets.BytesTaken(ends.receiver_name, now), Optional(Eq(3000)));
}

TEST(SocketsToPeer, OfAUnixSocketCountWhatComesAndGoes) {
  const std::string path = ::testing::TempDir() + "socket_use." + std::to_string(getpid());
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  const Descriptor listener(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  ASSERT_EQ(bind(listener.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  listen(listener.get(), 1);
  const Descriptor sender(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  ASSERT_EQ(connect(sender.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  const Descriptor receiver(accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
  unlink(path.c_str());

  const absl::Time now = absl::Now();
  SocketsToPeer sockets;
  EXPECT_THAT(sockets.BytesTaken("unix:" + path, now), Optional(Eq(0)));
  Write(sender, 50'000);
  const int64_t waiting = *sockets.BytesTaken("unix:" + path, now);
  EXPECT_GE(waiting, 50'000);
  EXPECT_EQ(sockets.BytesTaken("unix:" + path, now), waiting) << "nobody reads";
  std::string bytes(50'000, ' ');
  ASSERT_EQ(recv(receiver.get(), bytes.data(), bytes.size(), MSG_WAITALL), 50'000);
  EXPECT_GE(sockets.BytesTaken("unix:" + path, now), waiting + 50'000);
}

TEST(SocketsToPeer, LeaveADescriptorAloneThatHasBecomeAnothers) {
  const absl::Time now = absl::Now();
  SocketsToPeer sockets;
  Ends ends = Connect();
  EXPECT_THAT(sockets.BytesTaken(ends.receiver_name, now), Optional(Eq(0)));
  const Ends others = Connect();
  Write(others.sender, 5000);
  ASSERT_EQ(dup3(others.sender.get(), ends.sender.get(), O_CLOEXEC), ends.sender.get());
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_THAT(sockets.BytesTaken(ends.receiver_name, now), Optional(Eq(0)));
}

// The kernel asks such a machine after 0.2, 0.4, 0.8, … s whether its process reads again.
TEST(UnansweredFor, IsNothingWhileThePeerLivesAndDoesNotRead) {
  const Ends ends = Connect();
  fcntl(ends.sender.get(), F_SETFL, O_NONBLOCK);
  const std::string bytes(1 << 20, 'x');
  while (send(ends.sender.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL) > 0) {
  }
  uint32_t longest_ms = 0;
  const absl::Time until = absl::Now() + absl::Seconds(8);
  while (absl::Now() < until) {
    tcp_info info = {};
    socklen_t length = sizeof info;
    getsockopt(ends.sender.get(), IPPROTO_TCP, TCP_INFO, &info, &length);
    longest_ms = std::max(longest_ms, info.tcpi_last_ack_recv);
    ASSERT_EQ(UnansweredFor(ends.sender.get()), absl::ZeroDuration());
    absl::SleepFor(absl::Milliseconds(20));
  }
  EXPECT_GT(longest_ms, 2000) << "it was not quiet, so that this shows nothing";
}

}  // namespace
}  // namespace prefilld::wire
