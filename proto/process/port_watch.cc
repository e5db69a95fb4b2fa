#include "proto/process/port_watch.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <optional>
#include <utility>

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/registry.h>

#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "proto/process/health.h"
#include "proto/process/log.h"
#include "proto/wire/arrivals.h"
#include "proto/wire/connections.h"
#include "proto/wire/host_port.h"

namespace prefilld::process {
namespace {

constexpr absl::Duration kTick = absl::Milliseconds(500);
constexpr absl::Duration kLogInterval = absl::Seconds(10);

// Waits until `events` happen. Returns false when the time is up.
bool Await(int fd, short events, absl::Time until) {
  pollfd entry = {.fd = fd, .events = events, .revents = 0};
  int ready = 0;
  do {
    const absl::Duration left = until - absl::Now();
    if (left <= absl::ZeroDuration()) return false;
    ready = poll(&entry, 1, static_cast<int>(absl::ToInt64Milliseconds(left)) + 1);
  } while (ready == 0 || (ready < 0 && errno == EINTR));
  return ready > 0;
}

int Connect(const sockaddr* address, socklen_t length) {
  const int fd = socket(address->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  if (connect(fd, address, length) == 0 || errno == EINPROGRESS) return fd;
  close(fd);
  return -1;
}

int StartConnectingTo(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  return Connect(reinterpret_cast<sockaddr*>(&address), sizeof address);
}

int StartConnecting(const wire::HostPort& address) {
  sockaddr_storage storage = {};
  socklen_t length = sizeof(sockaddr_in);
  auto& v4 = reinterpret_cast<sockaddr_in&>(storage);
  auto& v6 = reinterpret_cast<sockaddr_in6&>(storage);
  if (inet_pton(AF_INET, address.host.c_str(), &v4.sin_addr) == 1) {
    v4.sin_family = AF_INET;
    v4.sin_port = htons(static_cast<uint16_t>(address.port));
  } else if (inet_pton(AF_INET6, address.host.c_str(), &v6.sin6_addr) == 1) {
    v6.sin6_family = AF_INET6;
    v6.sin6_port = htons(static_cast<uint16_t>(address.port));
    length = sizeof v6;
  } else {
    return -1;
  }
  return Connect(reinterpret_cast<sockaddr*>(&storage), length);
}

// The server greets (HTTP/2) or closes (TLS, whose client must speak first): it has read the end of
// this side's bytes either way.
bool IsAnswered(int fd, absl::Time until) {
  if (!Await(fd, POLLOUT, until)) return false;
  int error = 0;
  socklen_t length = sizeof error;
  getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length);
  if (error != 0) return false;
  shutdown(fd, SHUT_WR);
  return Await(fd, POLLIN, until);
}

}  // namespace

bool Answers(const std::string& address, absl::Duration timeout) {
  const std::optional<wire::HostPort> host_port = wire::ParseHostPort(address);
  const std::optional<std::string> path = wire::UnixSocketPath(address);
  int fd = -1;
  if (path.has_value()) {
    fd = StartConnectingTo(*path);
  } else if (host_port.has_value()) {
    fd = StartConnecting(*host_port);
  }
  if (fd < 0) return false;
  const bool answered = IsAnswered(fd, absl::Now() + timeout);
  close(fd);
  return answered;
}

// Counters take what was added since the last time.
struct PortWatch::Figures {
  explicit Figures(std::shared_ptr<prometheus::Registry> shared_registry)
      : registry(std::move(shared_registry)),
        open(NewGauge("prefilld_connections", "Connections that are open.")),
        limit(NewGauge("prefilld_connections_limit",
                       "Connections that may be open; more are refused.")),
        refused(NewCounter("prefilld_connections_refused_total",
                           "Connections refused because too many were open.")),
        errors(NewCounter("prefilld_accept_errors_total",
                          "Times that a connection could not be accepted for want of file "
                          "descriptors or memory.")),
        gone(NewCounter("prefilld_connections_gone_total",
                        "Connections closed because the peer vanished or left its socket unread "
                        "for very long.")),
        arriving(NewGauge("prefilld_requests_arriving",
                          "Calls that have begun and whose request is not here yet.")),
        late(NewCounter("prefilld_requests_late_total",
                        "Calls ended because their request took too long to arrive.")),
        broken_off(NewCounter("prefilld_requests_broken_off_total",
                              "Calls that ended before their request was here: it was too long for "
                              "this server, the caller cancelled, or the connection was lost.")),
        streams(NewGauge("prefilld_open_streams",
                         "Calls of this program's services that have begun and are not over.")),
        most_streams(NewGauge("prefilld_open_streams_of_one_connection",
                              "The most of them that one connection has; Unix sockets count as "
                              "one.")),
        fruitless(NewCounter("prefilld_connections_fruitless_total",
                             "Connections that ended without a call though the peer had sent "
                             "something: failed handshakes (an expired or a foreign certificate, "
                             "plain text on a port with TLS) and other protocols.")),
        reachable(NewGauge("prefilld_reachable",
                           "0 when new connections to the own addresses are not answered.")) {
    reachable.Set(1);  // until the first connections tell otherwise
  }

  prometheus::Gauge& NewGauge(const std::string& name, const std::string& help) {
    return prometheus::BuildGauge().Name(name).Help(help).Register(*registry).Add({});
  }
  prometheus::Counter& NewCounter(const std::string& name, const std::string& help) {
    return prometheus::BuildCounter().Name(name).Help(help).Register(*registry).Add({});
  }

  void Update(const wire::Connections::Counts& now, const wire::Arrivals::Counts& requests) {
    arriving.Set(static_cast<double>(requests.open));
    streams.Set(static_cast<double>(requests.streams));
    most_streams.Set(static_cast<double>(requests.most_streams));
    late.Increment(static_cast<double>(requests.late - seen_late));
    seen_late = requests.late;
    broken_off.Increment(static_cast<double>(requests.broken_off - seen_broken_off));
    seen_broken_off = requests.broken_off;
    fruitless.Increment(static_cast<double>(now.fruitless - seen.fruitless));
    open.Set(static_cast<double>(now.open));
    limit.Set(static_cast<double>(now.limit));
    refused.Increment(static_cast<double>(now.refused - seen.refused));
    errors.Increment(static_cast<double>(now.accept_errors - seen.accept_errors));
    gone.Increment(static_cast<double>(now.gone - seen.gone));
    seen = now;
    Log(absl::Now());
  }

  // Writes one line for all that happened in a while.
  void Log(absl::Time now) {
    if (now < next_log) return;
    if (seen.refused == logged.refused && seen.accept_errors == logged.accept_errors &&
        seen.gone == logged.gone && seen.fruitless == logged.fruitless &&
        seen_late == logged_late) {
      return;
    }
    LogEvent(LogLevel::kWarning, "connections",
             {{"open", seen.open},
              {"limit", seen.limit},
              {"refused", seen.refused - logged.refused},
              {"accept_errors", seen.accept_errors - logged.accept_errors},
              {"gone", seen.gone - logged.gone},
              {"fruitless", seen.fruitless - logged.fruitless},
              {"late_requests", seen_late - logged_late}});
    logged = seen;
    logged_late = seen_late;
    next_log = now + kLogInterval;
  }

  const std::shared_ptr<prometheus::Registry> registry;
  prometheus::Gauge& open;
  prometheus::Gauge& limit;
  prometheus::Counter& refused;
  prometheus::Counter& errors;
  prometheus::Counter& gone;
  prometheus::Gauge& arriving;
  prometheus::Counter& late;
  prometheus::Counter& broken_off;
  prometheus::Gauge& streams;
  prometheus::Gauge& most_streams;
  prometheus::Counter& fruitless;
  prometheus::Gauge& reachable;
  wire::Connections::Counts seen, logged;
  int64_t seen_late = 0, logged_late = 0, seen_broken_off = 0;
  absl::Time next_log = absl::InfinitePast();
};

PortWatch::PortWatch(const wire::Connections& connections, const wire::Arrivals* arrivals,
                     Health& health, std::shared_ptr<prometheus::Registry> registry,
                     const Timing& timing)
    : connections_(connections),
      arrivals_(arrivals),
      health_(health),
      timing_(timing),
      figures_(std::make_unique<Figures>(std::move(registry))),
      thread_([this] { Run(); }) {}

PortWatch::~PortWatch() {
  stop_.Notify();
  thread_.join();
}

void PortWatch::Run() {
  absl::Time next_dial = absl::Now() + timing_.interval;
  do {
    figures_->Update(connections_.counts(),
                     arrivals_ == nullptr ? wire::Arrivals::Counts() : arrivals_->counts());
    if (absl::Now() < next_dial) continue;
    Dial();
    next_dial = absl::Now() + timing_.interval;
  } while (!stop_.WaitForNotificationWithTimeout(std::min(kTick, timing_.interval)));
}

void PortWatch::Dial() {
  const bool was_deaf = failures_ >= timing_.failures;
  std::string silent;
  for (const std::string& address : connections_.own_addresses()) {
    if (silent.empty() && !Answers(address, timing_.timeout)) silent = address;
  }
  failures_ = silent.empty() ? 0 : failures_ + 1;
  const bool deaf = failures_ >= timing_.failures;
  health_.SetReachable(!deaf);
  figures_->reachable.Set(deaf ? 0 : 1);
  if (deaf == was_deaf) return;
  LogEvent(deaf ? LogLevel::kError : LogLevel::kInfo, deaf ? "deaf" : "answers_again",
           {{"address", deaf ? silent : absl::StrJoin(connections_.own_addresses(), ",")},
            {"failures", int64_t{failures_}}});
}

}  // namespace prefilld::process
