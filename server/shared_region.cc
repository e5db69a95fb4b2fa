#include "server/shared_region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "model/prefill/prefill_engine.h"
#include "proto/status_macros.h"

namespace prefilld::server {
namespace {

size_t RoundToPages(size_t bytes) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

}  // namespace

SharedRegion::SharedRegion(std::shared_ptr<SharedMemoryUse> use, size_t buffer_bytes,
                           int num_buffers)
    : use_(std::move(use)),
      buffer_bytes_(RoundToPages(buffer_bytes)),
      bytes_(buffer_bytes_ * num_buffers) {}

absl::StatusOr<std::shared_ptr<SharedRegion>> SharedRegion::Create(
    model::PrefillEngine& engine, std::shared_ptr<SharedMemoryUse> use, size_t buffer_bytes,
    int num_buffers) {
  std::shared_ptr<SharedRegion> region(new SharedRegion(std::move(use), buffer_bytes, num_buffers));
  const auto bytes = static_cast<int64_t>(region->bytes_);
  // The destructor gives the bytes back, whatever fails from here on.
  if (region->use_->used.fetch_add(bytes) + bytes > region->use_->limit) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "shared memory for ", bytes, " bytes more; at most ", region->use_->limit, " in all"));
  }
  region->descriptor_ =
      wire::Descriptor(memfd_create("prefilld-kv", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!region->descriptor_.valid()) {
    return absl::FailedPreconditionError(absl::StrCat("memfd_create: ", std::strerror(errno)));
  }
  // All pages are taken here, where a lack of memory is an error. A page that is first taken by a
  // write ends the process if there is none.
  if (fallocate(region->descriptor(), 0, 0, bytes) != 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no ", bytes, " bytes of shared memory: ", std::strerror(errno)));
  }
  void* const memory = mmap(nullptr, region->bytes_, PROT_READ | PROT_WRITE,
                            MAP_SHARED | MAP_POPULATE, region->descriptor(), 0);
  if (memory == MAP_FAILED) {
    return absl::ResourceExhaustedError(absl::StrCat("mmap: ", std::strerror(errno)));
  }
  region->memory_ = static_cast<std::byte*>(memory);
  // The mapping above stays writable, and no other can be made so.
  if (fcntl(region->descriptor(), F_ADD_SEALS,
            F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("memory cannot be sealed: ", std::strerror(errno)));
  }
  PREFILLD_ASSIGN_OR_RETURN(region->pinned_, engine.AdoptStaging(memory, region->bytes_));
  return region;
}

SharedRegion::~SharedRegion() {
  pinned_ = model::DeviceBuffer();
  if (memory_ != nullptr) munmap(memory_, bytes_);
  use_->used.fetch_sub(static_cast<int64_t>(bytes_));
}

std::vector<std::byte*> SharedRegion::buffers() const {
  std::vector<std::byte*> buffers;
  for (size_t offset = 0; offset < bytes_; offset += buffer_bytes_) {
    buffers.push_back(memory_ + offset);
  }
  return buffers;
}

}  // namespace prefilld::server
