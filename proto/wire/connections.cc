#include "proto/wire/connections.h"

#include <fcntl.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/status_macros.h"
#include "proto/wire/socket_use.h"

namespace prefilld::wire {
namespace {

// A peer's machine that says nothing is asked after so long, and twice more.
constexpr int kTcpKeepAliveIdleSeconds = 20;
constexpr int kTcpKeepAliveIntervalSeconds = 5;
constexpr int kTcpKeepAliveProbes = 2;

constexpr absl::Duration kSweepInterval = absl::Seconds(1);
// The process may find descriptors again at any moment, and nothing announces it.
constexpr absl::Duration kPauseAfterError = absl::Milliseconds(100);
constexpr size_t kMaxRefused = 16;  // at once; the others are closed without a word
constexpr absl::Duration kRefusalTime = absl::Seconds(2);
// A writer is held back while so much is still unsent, so that it sees early what the peer takes.
constexpr int kUnsentBytes = 512 << 10;

void SetOption(int fd, int level, int option, int value) {
  setsockopt(fd, level, option, &value, sizeof value);
}

// TCP_USER_TIMEOUT is left alone: it would end a connection whose peer lives and does not read.
void SetSocketOptions(int fd) {
  SetOption(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  SetOption(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, kUnsentBytes);
  SetOption(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  SetOption(fd, IPPROTO_TCP, TCP_KEEPIDLE, kTcpKeepAliveIdleSeconds);
  SetOption(fd, IPPROTO_TCP, TCP_KEEPINTVL, kTcpKeepAliveIntervalSeconds);
  SetOption(fd, IPPROTO_TCP, TCP_KEEPCNT, kTcpKeepAliveProbes);
}

void Send(const Descriptor& fd, const std::string& bytes) {
  (void)!send(fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
}

bool OutOfResources(int error) {
  return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
}

absl::StatusOr<int64_t> ConnectionsThatFit() {
  rlimit limit = {};
  getrlimit(RLIMIT_NOFILE, &limit);
  const auto descriptors = static_cast<int64_t>(std::min<rlim_t>(limit.rlim_cur, rlim_t{1} << 40));
  const int64_t fit = (descriptors - Connections::kReservedDescriptors) / 2;
  if (fit >= Connections::kLeastConnections) return fit;
  return absl::UnavailableError(absl::StrCat(
      "the limit of ", descriptors, " open files is too low; at least ",
      Connections::kReservedDescriptors + 2 * Connections::kLeastConnections, " (ulimit -n)"));
}

}  // namespace

int64_t Connection::BytesTaken() const {
  return fd_.valid() ? BytesAcknowledged(fd_.get()) : moved_.load();
}

absl::StatusOr<std::unique_ptr<Connections>> Connections::Bind(const std::string& address,
                                                               const Limits& limits) {
  PREFILLD_ASSIGN_OR_RETURN(const int64_t fit, ConnectionsThatFit());
  PREFILLD_ASSIGN_OR_RETURN(ListeningSockets sockets, ListenOn(address));
  Limits lowered = limits;
  lowered.max_connections = std::min(limits.max_connections, fit);
  std::unique_ptr<Connections> connections(new Connections(lowered, std::move(sockets)));
  if (connections->epoll_.valid() && connections->stop_event_.valid()) return connections;
  return absl::UnavailableError("the process has no file descriptor left");
}

Connections::Connections(const Limits& limits, ListeningSockets sockets)
    : limits_(limits),
      sockets_(std::move(sockets)),
      epoll_(epoll_create1(EPOLL_CLOEXEC)),
      stop_event_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  epoll_event event = {.events = EPOLLIN, .data = {.fd = stop_event_.get()}};
  epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, stop_event_.get(), &event);
  for (const Descriptor& socket : sockets_.sockets) {
    event = {.events = 0, .data = {.fd = socket.get()}};
    epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, socket.get(), &event);
  }
}

Connections::~Connections() { Stop(); }

void Connections::Start(std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> acceptor,
                        std::function<void(absl::Time)> every_second) {
  acceptor_ = std::move(acceptor);
  every_second_ = std::move(every_second);
  thread_ = std::thread([this] { Run(); });
}

void Connections::Stop() {
  if (!thread_.joinable()) return;
  const uint64_t one = 1;
  (void)!write(stop_event_.get(), &one, sizeof one);
  thread_.join();
}

void Connections::WatchListeners(bool watch) {
  for (const Descriptor& socket : sockets_.sockets) {
    epoll_event event = {.events = watch ? uint32_t{EPOLLIN} : 0, .data = {.fd = socket.get()}};
    epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, socket.get(), &event);
  }
}

void Connections::Run() {
  WatchListeners(true);
  absl::Time next_sweep = absl::Now();
  std::array<epoll_event, 64> events;
  while (true) {
    const bool paused = paused_until_ != absl::InfinitePast();
    const int timeout_ms =
        static_cast<int>(absl::ToInt64Milliseconds(paused ? kPauseAfterError : kSweepInterval));
    const int count = epoll_wait(epoll_.get(), events.data(), events.size(), timeout_ms);
    const absl::Time now = absl::Now();
    for (int i = 0; i < count; ++i) {
      if (events[i].data.fd == stop_event_.get()) return;
      OnEvent(events[i].data.fd, now);
    }
    if (paused && now >= paused_until_) {
      paused_until_ = absl::InfinitePast();
      WatchListeners(true);
    }
    if (now >= next_sweep) {
      Sweep(now);
      if (every_second_ != nullptr) every_second_(now);
      next_sweep = now + kSweepInterval;
    }
  }
}

void Connections::OnEvent(int fd, absl::Time now) {
  const auto is_listener = [fd](const Descriptor& socket) { return socket.get() == fd; };
  if (std::any_of(sockets_.sockets.begin(), sockets_.sockets.end(), is_listener)) {
    return AcceptAll(fd, now);
  }
  if (const auto refused = refused_.find(fd); refused != refused_.end()) {
    if (!ReadRefused(refused->second)) refused_.erase(refused);
    return;
  }
  // gRPC, or the peer, has shut the connection down.
  epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
  std::shared_ptr<Connection> last_reference;  // released after the lock
  absl::MutexLock lock(&mu_);
  const auto open = open_.find(fd);
  if (open == open_.end()) return;
  last_reference = std::move(open->second);
  open_.erase(open);
  const auto named = by_peer_.find(last_reference->peer());
  if (named != by_peer_.end() && named->second == last_reference) by_peer_.erase(named);
  // Probes connect and say nothing. The end of a peer's bytes counts as one.
  if (!last_reference->peer().empty() && !last_reference->had_call_ && BytesReceived(fd) > 1) {
    ++num_fruitless_;
  }
}

void Connections::AcceptAll(int listener, absl::Time now) {
  while (true) {
    Descriptor fd(accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!fd.valid()) {
      if (errno == EINTR || errno == ECONNABORTED) continue;
      if (OutOfResources(errno)) {
        ++accept_errors_;
        // Callers wait in the kernel's queue meanwhile.
        paused_until_ = now + kPauseAfterError;
        WatchListeners(false);
      }
      return;
    }
    if (num_open() >= limits_.max_connections) {
      Refuse(std::move(fd), now);
    } else {
      Admit(std::move(fd), listener, now);
    }
  }
}

void Connections::Admit(Descriptor fd, int listener, absl::Time now) {
  sockaddr_storage address = {};
  socklen_t length = sizeof address;
  if (getpeername(fd.get(), reinterpret_cast<sockaddr*>(&address), &length) != 0) return;
  SetSocketOptions(fd.get());
  Descriptor second(fcntl(fd.get(), F_DUPFD_CLOEXEC, 0));
  if (!second.valid()) {
    ++accept_errors_;
    return;
  }
  const int watched = second.get();
  auto connection = std::make_shared<Connection>(std::move(second), PeerName(address));
  connection->last_moved_ = now;
  {
    absl::MutexLock lock(&mu_);
    if (!connection->peer().empty()) by_peer_[connection->peer()] = connection;
    open_[watched] = std::move(connection);
  }
  ++num_accepted_;
  grpc::experimental::ExternalConnectionAcceptor::NewConnectionParameters parameters;
  parameters.listener_fd = listener;
  parameters.fd = fd.release();
  acceptor_->HandleNewConnection(&parameters);
  // Without any event asked for, epoll tells of the end of a connection alone.
  epoll_event event = {.events = 0, .data = {.fd = watched}};
  epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, watched, &event);
}

void Connections::Refuse(Descriptor fd, absl::Time now) {
  ++num_refused_;
  if (!limits_.says_why || refused_.size() >= kMaxRefused) return;
  epoll_event event = {.events = EPOLLIN, .data = {.fd = fd.get()}};
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd.get(), &event) != 0) return;
  Send(fd, Refusal::Greeting());
  const int key = fd.get();
  refused_.emplace(key, Refused{.fd = std::move(fd),
                                .until = now + kRefusalTime,
                                .refusal = Refusal(absl::StrCat("too many connections; at most ",
                                                                limits_.max_connections))});
}

// Returns false at the end of the connection.
bool Connections::ReadRefused(Refused& refused) {
  std::array<char, 4096> bytes;
  const ssize_t size = read(refused.fd.get(), bytes.data(), bytes.size());
  if (size < 0) return errno == EAGAIN || errno == EINTR;
  if (size == 0) return false;
  if (refused.told) return true;
  const std::string answer = refused.refusal.Take(absl::string_view(bytes.data(), size));
  if (answer.empty()) return true;
  Send(refused.fd, answer);
  shutdown(refused.fd.get(), SHUT_WR);
  refused.told = true;
  return true;
}

void Connections::Sweep(absl::Time now) {
  absl::erase_if(refused_, [now](const auto& entry) {
    const auto& [fd, refused] = entry;
    if (refused.until >= now) return false;
    if (!refused.told) Send(refused.fd, refused.refusal.Goaway());
    return true;
  });
  std::vector<std::shared_ptr<Connection>> open;
  {
    absl::MutexLock lock(&mu_);
    for (const auto& [fd, connection] : open_) open.push_back(connection);
  }
  for (const auto& connection : open) {
    if (!IsGone(*connection, now)) continue;
    ++num_gone_;
    // gRPC sees the end of the connection and fails its calls.
    shutdown(connection->fd_.get(), SHUT_RDWR);
  }
}

bool Connections::IsGone(Connection& connection, absl::Time now) const {
  const int fd = connection.fd_.get();
  int unsent = 0;
  ioctl(fd, SIOCOUTQ, &unsent);
  // A Unix socket acknowledges nothing, but what is unsent changes while its peer reads.
  const bool is_unix = connection.peer().empty();
  const int64_t taken = is_unix ? -int64_t{unsent} : BytesAcknowledged(fd);
  if (is_unix) unix_callers_->moved_ += std::abs(taken - connection.last_taken_);
  if (unsent == 0 || taken != connection.last_taken_) {
    connection.last_taken_ = taken;
    connection.last_moved_ = now;
  }
  if (unsent > 0 && now - connection.last_moved_ > limits_.stuck) return true;
  return unsent > 0 && UnansweredFor(fd) > limits_.silence;
}

int64_t Connections::num_open() const {
  absl::MutexLock lock(&mu_);
  return static_cast<int64_t>(open_.size());
}

Connections::Counts Connections::counts() const {
  return {.open = num_open(),
          .limit = limits_.max_connections,
          .accepted = num_accepted_,
          .refused = num_refused_,
          .accept_errors = accept_errors_,
          .gone = num_gone_,
          .fruitless = num_fruitless_};
}

void Connections::NoteCall(absl::string_view peer) const {
  const std::shared_ptr<const Connection> connection = Find(peer);
  if (connection != nullptr) connection->had_call_ = true;
}

std::shared_ptr<const Connection> Connections::Find(absl::string_view peer) const {
  if (absl::StartsWith(peer, "unix:")) return unix_callers_;
  absl::MutexLock lock(&mu_);
  const auto found = by_peer_.find(peer);
  return found == by_peer_.end() ? nullptr : found->second;
}

}  // namespace prefilld::wire
