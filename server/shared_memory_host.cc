#include "server/shared_memory_host.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/process/log.h"
#include "proto/status_macros.h"
#include "proto/wire/memory_socket_name.h"
#include "proto/wire/sealed_memory.h"
#include "server/shared_memory_metrics.h"
#include "server/shared_region.h"
#include "server/staging_ring.h"

namespace prefilld::server {
namespace {

using Visitor = SharedMemoryMetrics::Visitor;

// How often it is looked who has gone, while consumers are here.
constexpr int kLookForPastMs = 200;
// A system without a descriptor or memory for one more connection is not asked again before that.
// Whoever wants to connect waits in the socket's queue meanwhile.
constexpr int kPauseMs = 200;

void LogNoSharedMemory(const absl::Status& reason) {
  process::LogEvent(process::LogLevel::kWarning, "no_shared_memory",
                    {{"reason", std::string(reason.message())}});
}

bool IsOfOneConnection(int error) {
  return error == EAGAIN || error == ECONNABORTED || error == EINTR;
}

}  // namespace

SharedMemoryHost::SharedMemoryHost(const Settings& settings, const Surroundings& surroundings)
    : surroundings_{.engine = surroundings.engine,
                    .ring = surroundings.ring,
                    .scheduler = surroundings.scheduler,
                    .metrics = surroundings.metrics,
                    .use = std::make_shared<SharedMemoryUse>(SharedMemoryUse::Limits{
                        .bytes = settings.max_bytes,
                        .attachments = settings.max_attachments,
                        .is_shared_by_tenants = settings.is_shared_by_tenants}),
                    .buffer_bytes = SharedRegion::RoundToPages(surroundings.ring.buffer_bytes()),
                    .most_bytes = UsefulSharedBytes(static_cast<int64_t>(SharedRegion::RoundToPages(
                                                        surroundings.ring.buffer_bytes())),
                                                    settings.max_lanes)},
      // One more than may be attached is told so.
      most_visits_(kMaxUnknown + static_cast<size_t>(settings.max_attachments) + 1) {}

absl::StatusOr<std::unique_ptr<SharedMemoryHost>> SharedMemoryHost::Create(
    const Settings& settings, const Surroundings& surroundings) {
  std::unique_ptr<SharedMemoryHost> host(new SharedMemoryHost(settings, surroundings));
  host->terms_.buffer_bytes = host->surroundings_.buffer_bytes;
  host->stop_event_ = wire::Descriptor(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!host->stop_event_.valid()) {
    LogNoSharedMemory(absl::UnavailableError(absl::StrCat("eventfd: ", std::strerror(errno))));
    return host;
  }
  if (const absl::Status status = host->CheckSystem(); !status.ok()) {
    LogNoSharedMemory(status);
    return host;
  }
  PREFILLD_RETURN_IF_ERROR(host->Listen(settings.folder));
  if (host->terms_.sockets.empty()) return host;
  host->accepting_ = std::thread([self = host.get()] { self->AcceptAll(); });
  return host;
}

// A system that cannot seal memory, or pin it, is found out before anything is offered.
absl::Status SharedMemoryHost::CheckSystem() const {
  const auto bytes = static_cast<int64_t>(surroundings_.buffer_bytes);
  PREFILLD_ASSIGN_OR_RETURN(SharedMemoryUse::Share share,
                            SharedMemoryUse::Take(surroundings_.use, /*tenant=*/0, bytes));
  PREFILLD_ASSIGN_OR_RETURN(wire::Descriptor memory, wire::MakeSealedMemory(bytes));
  return SharedRegion::Map(surroundings_.engine, std::move(share), std::move(memory), bytes, bytes)
      .status();
}

// The abstract socket needs no file, so whoever cannot have one still has the other.
absl::Status SharedMemoryHost::Listen(const std::string& folder) {
  const std::string address = absl::StrCat("unix-abstract:", wire::NewMemorySocketName());
  if (auto listener = wire::ListenForPackets(address); listener.ok()) {
    abstract_ = *std::move(listener);
    terms_.sockets.push_back(address);
  } else {
    LogNoSharedMemory(listener.status());
  }
  if (folder.empty()) return absl::OkStatus();
  PREFILLD_ASSIGN_OR_RETURN(file_, SocketFile::Create(folder));
  terms_.sockets.push_back(absl::StrCat("unix:", file_->path()));
  return absl::OkStatus();
}

SharedMemoryHost::~SharedMemoryHost() {
  stops_ = true;
  const uint64_t one = 1;
  if (stop_event_.valid()) (void)!write(stop_event_.get(), &one, sizeof one);
  if (accepting_.joinable()) accepting_.join();
  std::list<Visit> last;
  {
    absl::MutexLock lock(&mu_);
    last.swap(visits_);
  }
  for (Visit& visit : last) visit.consumer.Stop();
  for (Visit& visit : last) visit.thread.join();
  last.clear();
  const absl::Time patience = absl::Now() + kLastMemory;
  while (surroundings_.use->total().bytes > 0 && absl::Now() < patience) {
    absl::SleepFor(absl::Milliseconds(1));
  }
}

void SharedMemoryHost::AcceptAll() {
  constexpr size_t kStop = 0;
  constexpr int kForEver = -1;
  const auto entry = [](int fd) { return pollfd{.fd = fd, .events = POLLIN, .revents = 0}; };
  std::array<pollfd, 3> entries = {entry(stop_event_.get()), entry(abstract_.get()),
                                   entry(file_ == nullptr ? -1 : file_->listener().get())};
  while (!stops_) {
    const bool has_work = ForgetPast();
    poll(entries.data(), entries.size(), has_work ? kLookForPastMs : kForEver);
    for (size_t i = kStop + 1; i < entries.size(); ++i) {
      if ((entries[i].revents & POLLIN) == 0 || Accept(entries[i].fd)) continue;
      poll(&entries[kStop], 1, kPauseMs);
      break;
    }
  }
}

bool SharedMemoryHost::Accept(int listener) {
  wire::Descriptor connection(accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (connection.valid()) {
    Admit(std::move(connection));
    return true;
  }
  if (IsOfOneConnection(errno)) return true;
  process::LogEvent(process::LogLevel::kWarning, "shared_memory_not_accepted",
                    {{"reason", std::strerror(errno)}});
  return false;
}

void SharedMemoryHost::Admit(wire::Descriptor connection) {
  absl::MutexLock lock(&mu_);
  const auto unknown = std::count_if(visits_.begin(), visits_.end(), [](const Visit& visit) {
    return !visit.consumer.is_known() && !visit.is_over;
  });
  if (static_cast<size_t>(unknown) >= kMaxUnknown || visits_.size() >= most_visits_) {
    surroundings_.metrics.Count(Visitor::kTooMany);
    return;
  }
  Visit& visit = visits_.emplace_back(wire::PacketSocket(std::move(connection)), surroundings_);
  try {
    visit.thread = std::thread([&visit] {
      visit.consumer.Run();
      visit.is_over = true;
    });
  } catch (const std::system_error& error) {
    // No more threads may be made. The consumer gets its KV over gRPC.
    visits_.pop_back();
    surroundings_.metrics.Count(Visitor::kTooMany);
    process::LogEvent(process::LogLevel::kWarning, "shared_memory_not_accepted",
                      {{"reason", error.what()}});
  }
}

bool SharedMemoryHost::ForgetPast() {
  std::list<Visit> past;  // their memory is unmapped without the lock
  bool any_left = false;
  {
    absl::MutexLock lock(&mu_);
    for (auto visit = visits_.begin(); visit != visits_.end();) {
      const auto next = std::next(visit);
      if (visit->is_over) past.splice(past.end(), visits_, visit);
      visit = next;
    }
    any_left = !visits_.empty();
  }
  for (Visit& visit : past) visit.thread.join();
  past.clear();
  const SharedMemoryUse::Amount used = surroundings_.use->total();
  surroundings_.metrics.SetUse(used.bytes, used.attachments);
  return used.bytes > 0 || any_left;
}

}  // namespace prefilld::server
