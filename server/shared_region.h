// A consumer's memory, as the server has mapped it.
#ifndef PREFILLD_SERVER_SHARED_REGION_H_
#define PREFILLD_SERVER_SHARED_REGION_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/device/device.h"
#include "proto/wire/descriptor.h"
#include "proto/wire/sealed_memory.h"
#include "server/shared_memory_use.h"

namespace prefilld::model {
class PrefillEngine;
}

namespace prefilld::server {

// Staging buffers that lie in a memfd of a consumer's, one request after the other. The consumer
// made all of its pages, so they count as the consumer's, and from Map on it can neither take pages
// away nor resize it: so the server never makes a page there, and no write of it fails.
//
// The consumer may write there at any time. So the server takes nothing from it but the checksum of
// what it has put there, and payloads for that same consumer. It is unmapped when its last owner is
// gone. Thread-safe.
class SharedRegion {
 public:
  // Maps the memory for writing, pins it if the device wants that, and closes the descriptor.
  // `buffer_bytes` is that of RoundToPages. Errors:
  // - INVALID_ARGUMENT: the descriptor is not what the contract wants; says in which point.
  // - RESOURCE_EXHAUSTED: it cannot be mapped or pinned.
  // The region must not outlive `engine`.
  static absl::StatusOr<std::shared_ptr<SharedRegion>> Map(model::PrefillEngine& engine,
                                                           SharedMemoryUse::Share share,
                                                           wire::Descriptor memory, uint64_t bytes,
                                                           size_t buffer_bytes);
  // Unpins the memory before it is unmapped.
  ~SharedRegion() { pinned_ = model::DeviceBuffer(); }
  SharedRegion(const SharedRegion&) = delete;
  SharedRegion& operator=(const SharedRegion&) = delete;

  static size_t RoundToPages(size_t bytes);

  size_t bytes() const { return mapping_.bytes(); }
  uint64_t OffsetOf(const std::byte* buffer) const {
    return static_cast<uint64_t>(buffer - mapping_.data());
  }
  // Charges it to the tenant of the consumer's next request (SharedMemoryUse::Share::MoveTo). Calls
  // may not run at once.
  absl::Status ChargeTo(int tenant) { return share_.MoveTo(tenant); }

 private:
  friend class StagingRing;

  SharedRegion(SharedMemoryUse::Share share, wire::Mapping mapping, size_t buffer_bytes);

  SharedMemoryUse::Share share_;
  const wire::Mapping mapping_;
  model::DeviceBuffer pinned_;  // makes the device write to it fast

  // The staging ring lends the buffers, and its lock guards these.
  std::vector<std::byte*> free_;
  const size_t num_buffers_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_SHARED_REGION_H_
