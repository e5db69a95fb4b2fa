#include "server/shared_memory_host.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <random>
#include <system_error>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "proto/process/log.h"
#include "proto/status_macros.h"
#include "proto/wire/kv_layout.h"
#include "server/prefill_job.h"
#include "server/scheduler.h"
#include "server/shared_memory_metrics.h"
#include "server/staging_ring.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;
using Visitor = SharedMemoryMetrics::Visitor;

constexpr char kFilePrefix[] = "prefilld-";
constexpr char kFileSuffix[] = ".sock";
// How often it is looked whether a request is over whose consumer stays.
constexpr absl::Duration kLookAround = absl::Milliseconds(200);

std::string NewSocketName() {
  std::random_device random;
  return absl::StrFormat("%s%08x%08x", kFilePrefix, random(), random());
}

// Removes the sockets of servers that are gone. One that is served has its name only since
// somebody listens on it.
void RemoveDeadSockets(const std::string& folder) {
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename();
    if (!absl::StartsWith(name, kFilePrefix) || !absl::EndsWith(name, kFileSuffix) ||
        !entry.is_socket(ignored)) {
      continue;
    }
    const auto served = wire::PacketSocket::Connect(absl::StrCat("unix:", entry.path().string()));
    if (absl::IsNotFound(served.status())) unlink(entry.path().c_str());
  }
}

// The size of a request's memory. A buffer holds the largest of its frames, which is a layer if
// that is small. There are enough buffers for some to be packed, some on their way and some being
// read on every lane, and no more than the request has frames.
struct RegionSize {
  size_t buffer_bytes;
  int num_buffers;
};

RegionSize SizeFor(const PrefillWork& work, size_t max_buffer_bytes) {
  constexpr int64_t kPerLane = 4, kBeside = 4;
  const int64_t pair_bytes = wire::KvPairBytes(work.layout);
  const int64_t blocks_per_frame = std::clamp<int64_t>(
      static_cast<int64_t>(max_buffer_bytes) / pair_bytes, 1, work.num_sent_blocks());
  const int64_t frames = work.layout.num_layers() *
                         ((work.num_sent_blocks() + blocks_per_frame - 1) / blocks_per_frame);
  return {.buffer_bytes = static_cast<size_t>(blocks_per_frame * pair_bytes),
          .num_buffers = static_cast<int>(
              std::clamp<int64_t>(frames, 1, kPerLane * work.num_lanes + kBeside))};
}

}  // namespace

SocketFile::SocketFile(std::string path, wire::Descriptor listener)
    : path_(std::move(path)), listener_(std::move(listener)) {}

absl::StatusOr<std::unique_ptr<SocketFile>> SocketFile::Create(const std::string& folder) {
  RemoveDeadSockets(folder);
  const std::string stem = absl::StrCat(folder, "/", NewSocketName());
  const std::string path = absl::StrCat(stem, kFileSuffix);
  const std::string unnamed = absl::StrCat(stem, ".new");
  PREFILLD_ASSIGN_OR_RETURN(wire::Descriptor listener,
                            wire::ListenForPackets(absl::StrCat("unix:", unnamed)));
  // Who may connect is up to the rights of the folder, and who may have memory up to the key.
  if (chmod(unnamed.c_str(), 0666) != 0 || rename(unnamed.c_str(), path.c_str()) != 0) {
    const std::string reason = std::strerror(errno);
    unlink(unnamed.c_str());
    return absl::UnavailableError(reason);
  }
  return std::unique_ptr<SocketFile>(new SocketFile(path, std::move(listener)));
}

SocketFile::~SocketFile() { unlink(path_.c_str()); }

SharedMemoryHost::SharedMemoryHost(const Settings& settings, const Surroundings& surroundings)
    : surroundings_(surroundings),
      use_(std::make_shared<SharedMemoryUse>(settings.max_bytes)),
      stop_event_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

absl::StatusOr<std::unique_ptr<SharedMemoryHost>> SharedMemoryHost::Create(
    const Settings& settings, const Surroundings& surroundings) {
  std::unique_ptr<SharedMemoryHost> host(new SharedMemoryHost(settings, surroundings));
  // A system that cannot seal memory, or pin it, is found out here.
  const auto probe = SharedRegion::Create(surroundings.engine, host->use_, /*buffer_bytes=*/1, 1);
  const absl::Status usable = probe.status();
  if (usable.ok()) PREFILLD_RETURN_IF_ERROR(host->Listen(settings.folder));
  if (host->sockets_.empty()) {
    process::LogEvent(process::LogLevel::kWarning, "no_shared_memory",
                      {{"reason", std::string(usable.message())}});
    return host;
  }
  host->accepting_ = std::thread([self = host.get()] { self->AcceptAll(); });
  return host;
}

// The abstract socket needs no file, so whoever cannot have one still has the other.
absl::Status SharedMemoryHost::Listen(const std::string& folder) {
  const std::string address = absl::StrCat("unix-abstract:", NewSocketName());
  if (auto listener = wire::ListenForPackets(address); listener.ok()) {
    abstract_ = *std::move(listener);
    sockets_.push_back(address);
  }
  if (folder.empty()) return absl::OkStatus();
  PREFILLD_ASSIGN_OR_RETURN(file_, SocketFile::Create(folder));
  sockets_.push_back(absl::StrCat("unix:", file_->path()));
  return absl::OkStatus();
}

SharedMemoryHost::~SharedMemoryHost() {
  stops_ = true;
  const uint64_t one = 1;
  (void)!write(stop_event_.get(), &one, sizeof one);
  if (accepting_.joinable()) accepting_.join();
  std::list<Visit> last;
  {
    absl::MutexLock lock(&mu_);
    last.swap(visits_);
  }
  for (Visit& visit : last) visit.socket.Shutdown();
  for (Visit& visit : last) visit.thread.join();
  const absl::Time patience = absl::Now() + kLastMemory;
  while (use_->used > 0 && absl::Now() < patience) absl::SleepFor(absl::Milliseconds(1));
}

void SharedMemoryHost::AcceptAll() {
  std::vector<pollfd> entries = {{.fd = stop_event_.get(), .events = POLLIN, .revents = 0}};
  for (const int fd : {abstract_.get(), file_ == nullptr ? -1 : file_->listener().get()}) {
    entries.push_back({.fd = fd, .events = POLLIN, .revents = 0});
  }
  constexpr int kForEver = -1;
  while (!stops_) {
    const bool has_work = ForgetPast();
    poll(entries.data(), entries.size(),
         has_work ? static_cast<int>(absl::ToInt64Milliseconds(kLookAround)) : kForEver);
    for (const pollfd& entry : entries) {
      if ((entry.revents & POLLIN) == 0 || entry.fd == stop_event_.get()) continue;
      wire::Descriptor connection(
          accept4(entry.fd, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
      if (connection.valid()) {
        Admit(std::move(connection));
      } else if (errno == EMFILE || errno == ENFILE) {
        absl::SleepFor(kLookAround);  // the caller waits in the socket's queue meanwhile
      }
    }
  }
}

void SharedMemoryHost::Admit(wire::Descriptor connection) {
  absl::MutexLock lock(&mu_);
  const auto unknown = std::count_if(visits_.begin(), visits_.end(), [](const Visit& visit) {
    return !visit.is_known && !visit.is_over;
  });
  if (static_cast<size_t>(unknown) >= kMaxUnknown) {
    surroundings_.metrics.Count(Visitor::kTooMany);
    return;
  }
  Visit& visit = visits_.emplace_back(wire::PacketSocket(std::move(connection)));
  try {
    visit.thread = std::thread([this, &visit] {
      Serve(visit);
      visit.socket.Shutdown();
      visit.is_over = true;
    });
  } catch (const std::system_error&) {
    // No more threads may be made. The consumer gets its KV over gRPC.
    visits_.pop_back();
    surroundings_.metrics.Count(Visitor::kTooMany);
  }
}

bool SharedMemoryHost::ForgetPast() {
  const int64_t used = use_->used;
  surroundings_.metrics.SetUse(used);
  absl::MutexLock lock(&mu_);
  for (auto visit = visits_.begin(); visit != visits_.end();) {
    if (!visit->is_over) {
      ++visit;
      continue;
    }
    visit->thread.join();
    visit = visits_.erase(visit);
  }
  return used > 0 || !visits_.empty();
}

void SharedMemoryHost::Serve(Visit& visit) {
  v1::SharedMemoryRequest request;
  if (!visit.socket.Receive(request, kHandshake).ok() || !request.has_attach()) {
    return surroundings_.metrics.Count(Visitor::kBrokenOff);
  }
  const absl::StatusOr<Attachment> attachment = Attach(request.attach());
  v1::SharedMemoryAttached answer;
  answer.set_code(static_cast<int>(attachment.status().code()));
  answer.set_message(std::string(attachment.status().message()));
  if (!attachment.ok()) {
    surroundings_.metrics.Count(absl::IsResourceExhausted(attachment.status()) ? Visitor::kNoMemory
                                                                               : Visitor::kRefused);
    return visit.socket.Send(answer, kHandshake).IgnoreError();
  }
  visit.is_known = true;
  const auto& [job, region] = *attachment;
  answer.set_bytes(region->bytes());
  if (!visit.socket.Send(answer, kHandshake, region->descriptor()).ok() ||
      !visit.socket.Receive(request, kHandshake).ok() || !request.has_mapped()) {
    return surroundings_.metrics.Count(Visitor::kBrokenOff);
  }
  // In this order no frame is sent that lies there before its lane keeps it.
  job->delivery().KeepUntilAcknowledged();
  region->set_is_read(true);
  surroundings_.ring.Lend(*job->credit(), region);
  surroundings_.metrics.Count(Visitor::kAttached);
  End(*attachment, TakeReceipts(visit, *job));
}

absl::StatusOr<SharedMemoryHost::Attachment> SharedMemoryHost::Attach(
    const v1::AttachSharedMemory& request) {
  std::shared_ptr<PrefillJob> job =
      surroundings_.scheduler.Find(request.request_id(), request.receiver());
  if (job == nullptr || job->work().shared_memory.key().empty()) {
    return absl::NotFoundError("request_id: no such running request with shared memory");
  }
  if (!IsSameKey(request.key(), job->work().shared_memory.key())) {
    return absl::PermissionDeniedError("key: not the one of this request's Accepted");
  }
  if (!job->ClaimSharedMemory()) {
    return absl::AlreadyExistsError("the request's shared memory was attached before");
  }
  const RegionSize size = SizeFor(job->work(), surroundings_.ring.buffer_bytes());
  PREFILLD_ASSIGN_OR_RETURN(
      std::shared_ptr<SharedRegion> region,
      SharedRegion::Create(surroundings_.engine, use_, size.buffer_bytes, size.num_buffers));
  return Attachment{std::move(job), std::move(region)};
}

// Returns OK when the request is over, or the reason why it cannot go on like this: CANCELLED when
// the consumer has closed the connection, INVALID_ARGUMENT when it says what makes no sense.
absl::Status SharedMemoryHost::TakeReceipts(Visit& visit, PrefillJob& job) {
  v1::SharedMemoryRequest request;
  while (!stops_ && !job.ended()) {
    const absl::Status received = visit.socket.Receive(request, kLookAround);
    if (absl::IsDeadlineExceeded(received)) continue;
    if (absl::IsUnavailable(received)) {
      return absl::CancelledError("the consumer has closed the connection of its shared memory");
    }
    PREFILLD_RETURN_IF_ERROR(received);
    if (!request.has_receipt()) return absl::InvalidArgumentError("a message is no receipt");
    v1::LaneReceipt receipt;
    receipt.set_lane(request.receipt().lane());
    receipt.set_received(request.receipt().received());
    const auto taken = job.delivery().Acknowledge(receipt);
    if (taken.ok()) continue;
    if (job.ended()) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("lane ", receipt.lane(), ": ", taken.status().message()));
  }
  return absl::OkStatus();
}

void SharedMemoryHost::End(const Attachment& attachment, const absl::Status& reason) {
  PrefillJob& job = *attachment.job;
  attachment.region->set_is_read(false);
  surroundings_.ring.TakeBack(*job.credit());
  if (reason.ok() || job.ended()) return;
  if (!absl::IsCancelled(reason)) {
    job.Abort(Outcome::kInvalid,
              absl::InvalidArgumentError(absl::StrCat("shared memory: ", reason.message())));
  } else if (!job.work().resumable()) {
    job.OnCallCancelled();
  }
}

}  // namespace prefilld::server
