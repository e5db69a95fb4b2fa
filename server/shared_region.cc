#include "server/shared_region.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "model/prefill/prefill_engine.h"
#include "proto/status_macros.h"

namespace prefilld::server {
namespace {

absl::Status Unfit(absl::string_view reason) {
  return absl::InvalidArgumentError(absl::StrCat("descriptor: ", reason));
}

// The seals are asked for first: the kernel answers that for its own memory alone, and calls no
// file system, which could be a consumer's and not answer.
absl::Status CheckKind(const wire::Descriptor& memory, uint64_t bytes) {
  const int seals = fcntl(memory.get(), F_GET_SEALS);
  if (seals < 0) return Unfit(absl::StrCat("no memfd: F_GET_SEALS: ", std::strerror(errno)));
  constexpr int kNeeded = F_SEAL_SHRINK | F_SEAL_GROW;
  constexpr int kForbidden = F_SEAL_WRITE | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;
  if ((seals & kNeeded) != kNeeded || (seals & kForbidden) != 0) {
    return Unfit(absl::StrCat("seals 0x", absl::Hex(seals),
                              "; F_SEAL_SHRINK and F_SEAL_GROW, and no F_SEAL_WRITE, ",
                              "F_SEAL_FUTURE_WRITE or F_SEAL_SEAL"));
  }
  if ((fcntl(memory.get(), F_GETFL) & O_ACCMODE) != O_RDWR) {
    return Unfit("not open for reading and writing");
  }
  struct stat facts = {};
  struct statfs system = {};
  if (fstat(memory.get(), &facts) != 0 || fstatfs(memory.get(), &system) != 0) {
    return Unfit(std::strerror(errno));
  }
  if (system.f_type != TMPFS_MAGIC || !S_ISREG(facts.st_mode)) {
    return Unfit("no memfd of ordinary pages");
  }
  if (static_cast<uint64_t>(facts.st_size) != bytes) {
    return Unfit(absl::StrCat("has ", facts.st_size, " bytes; attach says ", bytes));
  }
  return absl::OkStatus();
}

// Pages behind the end are counted too, and a consumer can have made some before it sealed the
// size. A truncation to the same size takes them away. Once the last seal is there, no page can be
// taken away any more, so those that are counted then are all in the memory, and stay.
absl::Status SealPages(const wire::Descriptor& memory, uint64_t bytes) {
  if (ftruncate(memory.get(), static_cast<off_t>(bytes)) != 0) {
    return Unfit(absl::StrCat("pages behind its end cannot be dropped: ", std::strerror(errno)));
  }
  if (fcntl(memory.get(), F_ADD_SEALS, F_SEAL_FUTURE_WRITE) != 0) {
    return Unfit(absl::StrCat("cannot be sealed with F_SEAL_FUTURE_WRITE: ", std::strerror(errno)));
  }
  struct stat facts = {};
  if (fstat(memory.get(), &facts) != 0) return Unfit(std::strerror(errno));
  constexpr uint64_t kUnit = 512;
  const uint64_t allocated = static_cast<uint64_t>(facts.st_blocks) * kUnit;
  if (allocated >= bytes) return absl::OkStatus();
  return Unfit(absl::StrCat("of ", bytes, " bytes ", allocated, " are allocated; all must be"));
}

}  // namespace

size_t SharedRegion::RoundToPages(size_t bytes) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

SharedRegion::SharedRegion(SharedMemoryUse::Share share, wire::Mapping mapping, size_t buffer_bytes)
    : share_(std::move(share)),
      mapping_(std::move(mapping)),
      num_buffers_(mapping_.bytes() / buffer_bytes) {
  for (size_t i = 0; i < num_buffers_; ++i) free_.push_back(mapping_.data() + i * buffer_bytes);
}

absl::StatusOr<std::shared_ptr<SharedRegion>> SharedRegion::Map(model::PrefillEngine& engine,
                                                                SharedMemoryUse::Share share,
                                                                wire::Descriptor memory,
                                                                uint64_t bytes,
                                                                size_t buffer_bytes) {
  if (bytes < buffer_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("bytes ", bytes, "; a frame of this server takes ", buffer_bytes));
  }
  PREFILLD_RETURN_IF_ERROR(CheckKind(memory, bytes));
  PREFILLD_ASSIGN_OR_RETURN(wire::Mapping mapping,
                            wire::Mapping::Map(memory, bytes, PROT_READ | PROT_WRITE));
  PREFILLD_RETURN_IF_ERROR(SealPages(memory, bytes));
#ifdef MADV_POPULATE_WRITE
  // All pages are there, so that this makes none. Where it is unknown, writes find them one by one.
  if (madvise(mapping.data(), bytes, MADV_POPULATE_WRITE) != 0 && errno != EINVAL) {
    return absl::ResourceExhaustedError(
        absl::StrCat("its pages cannot be used: ", std::strerror(errno)));
  }
#endif
  std::shared_ptr<SharedRegion> region(
      new SharedRegion(std::move(share), std::move(mapping), buffer_bytes));
  PREFILLD_ASSIGN_OR_RETURN(
      region->pinned_,
      engine.AdoptStaging(region->mapping_.data(), region->num_buffers_ * buffer_bytes));
  return region;
}

}  // namespace prefilld::server
