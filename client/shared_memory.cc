#include "client/shared_memory.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "grpcpp/support/slice.h"
#include "prefill/v1/shared_memory.pb.h"
#include "proto/status_macros.h"
#include "proto/wire/descriptor.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::Accepted;
using ::prefill::v1::SharedMemoryAttached;
using ::prefill::v1::SharedMemoryRequest;

// A server that says nothing for so long is not waited for: its KV comes over gRPC.
constexpr absl::Duration kServerPatience = absl::Seconds(1);

absl::StatusOr<wire::PacketSocket> ConnectToAny(const Accepted& accepted) {
  absl::Status reason = absl::NotFoundError("the server offers no shared memory");
  for (const std::string& address : accepted.shared_memory().sockets()) {
    if (absl::StartsWith(address, "unix-abstract:") &&
        (accepted.shared_memory().network().empty() ||
         accepted.shared_memory().network() != wire::NetworkOfThisProcess())) {
      reason = absl::UnavailableError(absl::StrCat(address, ": of another network namespace"));
      continue;
    }
    auto socket = wire::PacketSocket::Connect(address);
    if (socket.ok()) return socket;
    reason = absl::UnavailableError(absl::StrCat(address, ": ", socket.status().message()));
  }
  return reason;
}

// More than a request with 16 lanes and frames of 4 MiB has. A larger memory is not of prefilld.
constexpr uint64_t kMaxBytes = uint64_t{1} << 30;

// Memory that could shrink would end this process when it is read behind its end, and pages that
// are not there yet would be made, and count as this process's.
absl::Status CheckMemory(const wire::Descriptor& memory, uint64_t bytes) {
  struct stat facts = {};
  struct statfs system = {};
  if (fstat(memory.get(), &facts) != 0 || fstatfs(memory.get(), &system) != 0 ||
      system.f_type != TMPFS_MAGIC || bytes == 0 || bytes > kMaxBytes ||
      static_cast<uint64_t>(facts.st_size) < bytes ||
      static_cast<uint64_t>(facts.st_blocks) * 512 < bytes) {
    return absl::FailedPreconditionError(
        absl::StrCat("the shared memory has no ", bytes, " bytes, or more than ", kMaxBytes));
  }
  const int seals = fcntl(memory.get(), F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return absl::FailedPreconditionError("the shared memory could shrink");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<SharedMemory>> SharedMemory::Attach(const Accepted& accepted) {
  PREFILLD_ASSIGN_OR_RETURN(wire::PacketSocket socket, ConnectToAny(accepted));
  SharedMemoryRequest request;
  request.mutable_attach()->set_request_id(accepted.request_id());
  request.mutable_attach()->set_receiver(accepted.receiver());
  request.mutable_attach()->set_key(accepted.shared_memory().key());
  PREFILLD_RETURN_IF_ERROR(socket.Send(request, kServerPatience));
  SharedMemoryAttached answer;
  wire::Descriptor memory;
  PREFILLD_RETURN_IF_ERROR(socket.Receive(answer, kServerPatience, &memory));
  if (answer.code() != 0) {
    return absl::Status(static_cast<absl::StatusCode>(answer.code()), answer.message());
  }
  PREFILLD_RETURN_IF_ERROR(CheckMemory(memory, answer.bytes()));
  void* const data = mmap(nullptr, answer.bytes(), PROT_READ, MAP_SHARED | MAP_POPULATE,
                          memory.get(), /*offset=*/0);
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(absl::StrCat("mmap: ", std::strerror(errno)));
  }
  return std::unique_ptr<SharedMemory>(
      new SharedMemory(std::move(socket), static_cast<const uint8_t*>(data), answer.bytes()));
}

SharedMemory::~SharedMemory() { munmap(const_cast<uint8_t*>(data_), bytes_); }

absl::Status SharedMemory::Begin() {
  SharedMemoryRequest request;
  request.mutable_mapped();
  absl::MutexLock lock(&begin_mu_);
  PREFILLD_RETURN_IF_ERROR(socket_.Send(request, kServerPatience));
  has_begun_ = true;
  return absl::OkStatus();
}

absl::StatusOr<wire::FramePayload> SharedMemory::PayloadOf(const wire::FrameHeader& frame) const {
  if (frame.shared_bytes > bytes_ || frame.shared_offset > bytes_ - frame.shared_bytes) {
    return absl::DataLossError(absl::StrCat("lane ", frame.lane, ", frame ", frame.sequence, ": ",
                                            frame.shared_bytes, " bytes at ", frame.shared_offset,
                                            " of shared memory that has ", bytes_));
  }
  grpc::Slice slice(data_ + frame.shared_offset, frame.shared_bytes, grpc::Slice::STATIC_SLICE);
  return wire::FramePayload({std::move(slice)}, 0, frame.shared_bytes);
}

bool SharedMemory::Acknowledge(uint32_t lane, uint64_t received) {
  if (!is_heard_.load(std::memory_order_relaxed)) return false;
  {
    absl::ReaderMutexLock lock(&begin_mu_);
    if (!has_begun_) return false;
  }
  SharedMemoryRequest request;
  request.mutable_receipt()->set_lane(lane);
  request.mutable_receipt()->set_received(received);
  if (socket_.Send(request, kServerPatience).ok()) return true;
  is_heard_.store(false, std::memory_order_relaxed);
  return false;
}

}  // namespace prefilld::client
