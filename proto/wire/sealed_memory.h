// Memory that one process makes and another one maps (prefill/v1/shared_memory.proto).
#ifndef PREFILLD_PROTO_WIRE_SEALED_MEMORY_H_
#define PREFILLD_PROTO_WIRE_SEALED_MEMORY_H_

#include <cstddef>
#include <utility>

#include "absl/status/statusor.h"
#include "proto/wire/descriptor.h"

namespace prefilld::wire {

// Makes a memfd that nobody can resize. All of its pages are there, and count as this process's.
// RESOURCE_EXHAUSTED: the system has no such memory; FAILED_PRECONDITION: it cannot seal any.
absl::StatusOr<Descriptor> MakeSealedMemory(size_t bytes);

// A mapping of such memory, unmapped on destruction. Move-only.
class Mapping {
 public:
  // `protection` is that of mmap. RESOURCE_EXHAUSTED: says why it cannot be mapped.
  static absl::StatusOr<Mapping> Map(const Descriptor& memory, size_t bytes, int protection);

  Mapping() = default;
  Mapping(Mapping&& other) noexcept { *this = std::move(other); }
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Mapping();

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  Mapping(std::byte* data, size_t bytes) : data_(data), bytes_(bytes) {}

  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_SEALED_MEMORY_H_
