#include "proto/wire/bench_peer.h"

#include <linux/tcp.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "proto/status_macros.h"
#include "proto/wire/host_port.h"

namespace prefilld::wire {
namespace {

// More than the caches hold, so that what is sent comes from memory.
constexpr int64_t kSourceBytes = int64_t{64} << 20;
constexpr int64_t kMaxPieceBytes = kSourceBytes;
constexpr size_t kMaxConnections = 64;
// After which it is tried again to accept a connection that there was no descriptor for.
constexpr int kPauseMs = 100;

// Two integers as they cross the wire.
using Pair = std::array<uint8_t, 16>;

Pair ToBytes(int64_t first, int64_t second) {
  Pair bytes;
  for (size_t i = 0; i < 8; ++i) {
    bytes[i] = static_cast<uint8_t>(static_cast<uint64_t>(first) >> (8 * i));
    bytes[8 + i] = static_cast<uint8_t>(static_cast<uint64_t>(second) >> (8 * i));
  }
  return bytes;
}

std::pair<int64_t, int64_t> FromBytes(const Pair& bytes) {
  uint64_t first = 0, second = 0;
  for (size_t i = 0; i < 8; ++i) {
    first |= uint64_t{bytes[i]} << (8 * i);
    second |= uint64_t{bytes[8 + i]} << (8 * i);
  }
  return {static_cast<int64_t>(first), static_cast<int64_t>(second)};
}

bool SendAll(int socket, const uint8_t* data, size_t bytes) {
  while (bytes > 0) {
    const ssize_t sent = send(socket, data, bytes, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return false;
    data += sent;
    bytes -= sent;
  }
  return true;
}

bool ReceiveAll(int socket, uint8_t* data, size_t bytes) {
  while (bytes > 0) {
    const ssize_t received = recv(socket, data, bytes, 0);
    if (received < 0 && errno == EINTR) continue;
    if (received <= 0) return false;
    data += received;
    bytes -= received;
  }
  return true;
}

absl::Status Unreachable(const std::string& address, absl::string_view reason) {
  return absl::UnavailableError(absl::StrCat(address, ": ", reason));
}

// Has calls on a socket fail for which nothing moves that long.
void LimitWaiting(int socket, absl::Duration patience) {
  const timeval limit = absl::ToTimeval(patience);
  setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
  setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
}

absl::StatusOr<Descriptor> Connect(const std::string& address, absl::Duration patience) {
  const std::optional<HostPort> host_port = ParseHostPort(address);
  if (!host_port.has_value()) return Unreachable(address, "it is not host:port");
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int error =
      getaddrinfo(host_port->host.c_str(), absl::StrCat(host_port->port).c_str(), &hints, &found);
  if (error != 0) return Unreachable(address, gai_strerror(error));
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> list(found, &freeaddrinfo);
  for (const addrinfo* entry = found; entry != nullptr; entry = entry->ai_next) {
    Descriptor fd(socket(entry->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!fd.valid()) continue;
    LimitWaiting(fd.get(), patience);
    if (connect(fd.get(), entry->ai_addr, entry->ai_addrlen) != 0) continue;
    return fd;
  }
  return Unreachable(address, std::strerror(errno));
}

// Sends an order. What it brings follows.
absl::StatusOr<Descriptor> Order(const std::string& address, int64_t bytes, int64_t piece_bytes,
                                 absl::Duration patience = kBenchPatience) {
  PREFILLD_ASSIGN_OR_RETURN(Descriptor fd, Connect(address, patience));
  const Pair order = ToBytes(bytes, piece_bytes);
  if (!SendAll(fd.get(), order.data(), order.size())) {
    return Unreachable(address, std::strerror(errno));
  }
  return fd;
}

bool Drop(int socket, int64_t bytes, std::vector<uint8_t>& buffer) {
  while (bytes > 0) {
    const ssize_t received = recv(socket, buffer.data(), buffer.size(), 0);
    if (received < 0 && errno == EINTR) continue;
    if (received <= 0) return false;
    bytes -= received;
  }
  return true;
}

std::unique_ptr<const uint8_t[]> MakeSource() {
  std::unique_ptr<uint8_t[]> source(new uint8_t[kSourceBytes]);
  std::memset(source.get(), 1, kSourceBytes);
  return source;
}

}  // namespace

ProcessUse UseOfThisProcess() {
  rusage use = {};
  getrusage(RUSAGE_SELF, &use);
  const auto microseconds = [](const timeval& time) {
    return int64_t{time.tv_sec} * 1'000'000 + time.tv_usec;
  };
  return {microseconds(use.ru_utime) + microseconds(use.ru_stime), use.ru_minflt};
}

absl::StatusOr<std::unique_ptr<BenchPeer>> BenchPeer::Listen(const std::string& address,
                                                             absl::Duration patience) {
  PREFILLD_ASSIGN_OR_RETURN(ListeningSockets listening, ListenOn(address));
  int ends[2];
  if (pipe(ends) != 0) return absl::ErrnoToStatus(errno, "pipe");
  std::unique_ptr<BenchPeer> peer(
      new BenchPeer(std::move(listening), patience, Descriptor(ends[0]), Descriptor(ends[1])));
  peer->accepting_ = std::thread([peer = peer.get()] { peer->Accept(); });
  return peer;
}

BenchPeer::BenchPeer(ListeningSockets listening, absl::Duration patience, Descriptor stop_reader,
                     Descriptor stop_writer)
    : listening_(std::move(listening)),
      patience_(patience),
      stop_reader_(std::move(stop_reader)),
      stop_writer_(std::move(stop_writer)),
      source_(MakeSource()) {}

BenchPeer::~BenchPeer() {
  const char stop = 0;
  (void)!write(stop_writer_.get(), &stop, 1);
  accepting_.join();
  std::list<Connection> connections;
  {
    absl::MutexLock lock(&mu_);
    for (Connection& connection : connections_) shutdown(connection.socket.get(), SHUT_RDWR);
    // The elements stay where they are, because their threads refer to them.
    connections.splice(connections.end(), connections_);
  }
  for (Connection& connection : connections) connection.thread.join();
}

void BenchPeer::Accept() {
  std::vector<pollfd> waited = {{stop_reader_.get(), POLLIN, 0}};
  for (const Descriptor& socket : listening_.sockets) waited.push_back({socket.get(), POLLIN, 0});
  while (true) {
    if (poll(waited.data(), waited.size(), -1) < 0) {
      if (errno == EINTR) continue;
      return;
    }
    if (waited[0].revents != 0) return;
    for (size_t i = 1; i < waited.size(); ++i) {
      if (waited[i].revents == 0) continue;
      Descriptor accepted(accept4(waited[i].fd, nullptr, nullptr, SOCK_CLOEXEC));
      if (accepted.valid()) {
        Start(std::move(accepted));
      } else if (errno != EAGAIN) {
        poll(waited.data(), 1, kPauseMs);  // the socket stays readable; the stop ends the pause
      }
    }
  }
}

void BenchPeer::Start(Descriptor socket) {
  absl::MutexLock lock(&mu_);
  for (auto it = connections_.begin(); it != connections_.end();) {
    if (!it->done) {
      ++it;
      continue;
    }
    it->thread.join();
    it = connections_.erase(it);
  }
  if (connections_.size() >= kMaxConnections) return;
  Connection& connection = connections_.emplace_back();
  connection.socket = std::move(socket);
  connection.thread = std::thread([this, &connection, fd = connection.socket.get()] {
    Serve(fd);
    shutdown(fd, SHUT_RDWR);
    absl::MutexLock done(&mu_);
    connection.done = true;
  });
}

void BenchPeer::Serve(int socket) const {
  LimitWaiting(socket, patience_);
  Pair order;
  if (!ReceiveAll(socket, order.data(), order.size())) return;
  const auto [bytes, piece_bytes] = FromBytes(order);
  if (bytes == 0) {
    const ProcessUse use = UseOfThisProcess();
    const Pair answer = ToBytes(use.cpu_us, use.page_faults);
    SendAll(socket, answer.data(), answer.size());
    return;
  }
  if (bytes < 0 || piece_bytes < 1 || piece_bytes > kMaxPieceBytes) return;
  const int on = 1;
  setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  int64_t offset = 0;
  for (int64_t left = bytes; left > 0;) {
    const int64_t piece = std::min({piece_bytes, left, kSourceBytes - offset});
    if (!SendAll(socket, source_.get() + offset, piece)) return;
    left -= piece;
    offset = (offset + piece) % kSourceBytes;
  }
}

absl::StatusOr<double> ReceiveOverTcp(const std::string& address, int64_t total_bytes,
                                      int num_connections, int64_t piece_bytes) {
  const int64_t bytes = std::max<int64_t>(1, total_bytes / num_connections);
  std::vector<std::vector<uint8_t>> buffers(num_connections, std::vector<uint8_t>(piece_bytes));
  std::vector<Descriptor> open;
  const absl::Time begin = absl::Now();
  for (int i = 0; i < num_connections; ++i) {
    PREFILLD_ASSIGN_OR_RETURN(Descriptor connection, Order(address, bytes, piece_bytes));
    open.push_back(std::move(connection));
  }
  std::atomic<int> failures = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < num_connections; ++i) {
    threads.emplace_back([&, i] {
      if (!Drop(open[i].get(), bytes, buffers[i])) ++failures;
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (failures > 0) return Unreachable(address, "the connection broke");
  return absl::ToDoubleSeconds(absl::Now() - begin);
}

absl::StatusOr<ProcessUse> AskUse(const std::string& address, absl::Duration patience) {
  PREFILLD_ASSIGN_OR_RETURN(const Descriptor fd, Order(address, 0, 0, patience));
  Pair answer;
  if (!ReceiveAll(fd.get(), answer.data(), answer.size())) {
    return Unreachable(address, "no answer to how much processor time it has used");
  }
  const auto [cpu_us, page_faults] = FromBytes(answer);
  return ProcessUse{cpu_us, page_faults};
}

}  // namespace prefilld::wire
