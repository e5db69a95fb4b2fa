#include "tests/bench/kv_stream/tcp_stream.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace prefilld::bench {
namespace {

constexpr int64_t kSourceBytes = int64_t{64} << 20;

class Socket {
 public:
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  ~Socket() {
    if (fd_ >= 0) close(fd_);
  }
  int fd() const { return fd_; }

 private:
  int fd_;
};

absl::Status ErrnoStatus(const char* call) {
  return absl::UnavailableError(absl::StrCat(call, ": ", std::strerror(errno)));
}

// The two ends of one loopback connection.
struct Connection {
  Socket sender;
  Socket receiver;
};

absl::StatusOr<Connection> Connect() {
  Socket listener(socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  auto* generic = reinterpret_cast<sockaddr*>(&address);
  if (bind(listener.fd(), generic, size) != 0) return ErrnoStatus("bind");
  if (listen(listener.fd(), 1) != 0) return ErrnoStatus("listen");
  if (getsockname(listener.fd(), generic, &size) != 0) return ErrnoStatus("getsockname");
  Socket sender(socket(AF_INET, SOCK_STREAM, 0));
  if (connect(sender.fd(), generic, size) != 0) return ErrnoStatus("connect");
  Socket receiver(accept(listener.fd(), nullptr, nullptr));
  if (receiver.fd() < 0) return ErrnoStatus("accept");
  const int on = 1;
  setsockopt(sender.fd(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  return Connection{std::move(sender), std::move(receiver)};
}

bool Send(int fd, const std::vector<char>& source, int64_t bytes, int64_t chunk_bytes) {
  int64_t offset = 0;
  while (bytes > 0) {
    const int64_t chunk = std::min({chunk_bytes, bytes, kSourceBytes - offset});
    const ssize_t sent = send(fd, source.data() + offset, chunk, MSG_NOSIGNAL);
    if (sent <= 0) return false;
    bytes -= sent;
    offset = (offset + sent) % kSourceBytes;
  }
  return true;
}

bool Receive(int fd, int64_t bytes, int64_t chunk_bytes) {
  std::vector<char> buffer(chunk_bytes);
  while (bytes > 0) {
    const ssize_t received = recv(fd, buffer.data(), buffer.size(), 0);
    if (received <= 0) return false;
    bytes -= received;
  }
  return true;
}

}  // namespace

absl::StatusOr<double> StreamOverTcp(int64_t total_bytes, int connections, int64_t chunk_bytes) {
  std::vector<Connection> open;
  for (int i = 0; i < connections; ++i) {
    auto connection = Connect();
    if (!connection.ok()) return connection.status();
    open.push_back(*std::move(connection));
  }
  const std::vector<char> source(kSourceBytes, 1);
  const int64_t bytes = total_bytes / connections;
  std::atomic<int> failures = 0;
  std::vector<std::thread> threads;
  const absl::Time begin = absl::Now();
  for (const Connection& connection : open) {
    threads.emplace_back([&, fd = connection.sender.fd()] {
      if (!Send(fd, source, bytes, chunk_bytes)) ++failures;
    });
    threads.emplace_back([&, fd = connection.receiver.fd()] {
      if (!Receive(fd, bytes, chunk_bytes)) ++failures;
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (failures > 0) return absl::UnavailableError("a TCP connection broke");
  return absl::ToDoubleSeconds(absl::Now() - begin);
}

}  // namespace prefilld::bench
