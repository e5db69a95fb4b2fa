#include "proto/wire/sealed_memory.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace prefilld::wire {
namespace {

// Makes memory that can never be executed, for systems that ask this of every program. Linux knows
// it since 6.3, and headers later.
constexpr unsigned kNoExecSeal = 0x0008;  // MFD_NOEXEC_SEAL

int CreateMemory(unsigned more_flags) {
  return memfd_create("prefilld-kv", MFD_CLOEXEC | MFD_ALLOW_SEALING | more_flags);
}

}  // namespace

// The pages are taken by fallocate, where a system that has none left says so. A container at its
// limit does not: there a process is ended, be the page taken here or by a write.
absl::StatusOr<Descriptor> MakeSealedMemory(size_t bytes) {
  Descriptor memory(CreateMemory(kNoExecSeal));
  if (!memory.valid() && errno == EINVAL) memory = Descriptor(CreateMemory(0));
  if (!memory.valid()) {
    return absl::FailedPreconditionError(absl::StrCat("memfd_create: ", std::strerror(errno)));
  }
  int result = 0;
  do {
    result = fallocate(memory.get(), /*mode=*/0, /*offset=*/0, static_cast<off_t>(bytes));
  } while (result != 0 && errno == EINTR);
  if (result != 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no ", bytes, " bytes of shared memory: ", std::strerror(errno)));
  }
  if (fcntl(memory.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("memory cannot be sealed: ", std::strerror(errno)));
  }
  return memory;
}

absl::StatusOr<Mapping> Mapping::Map(const Descriptor& memory, size_t bytes, int protection) {
  void* const data = mmap(nullptr, bytes, protection, MAP_SHARED, memory.get(), /*offset=*/0);
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(absl::StrCat("mmap: ", std::strerror(errno)));
  }
  return Mapping(static_cast<std::byte*>(data), bytes);
}

Mapping::~Mapping() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

}  // namespace prefilld::wire
