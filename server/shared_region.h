// Memory that the server writes and one consumer reads.
#ifndef PREFILLD_SERVER_SHARED_REGION_H_
#define PREFILLD_SERVER_SHARED_REGION_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "model/device/device.h"
#include "proto/wire/descriptor.h"

namespace prefilld::model {
class PrefillEngine;
}

namespace prefilld::server {

// The bytes of all regions together. Thread-safe.
struct SharedMemoryUse {
  explicit SharedMemoryUse(int64_t limit) : limit(limit) {}

  const int64_t limit;
  std::atomic<int64_t> used = 0;
};

// The staging buffers of one request, in a memfd that a consumer maps. The memory cannot be resized
// by anybody, and from Create on it can be mapped by others for reading alone. So nothing that a
// consumer does with its descriptor reaches the server. It is gone when its last owner, its last
// descriptor and its last mapping are. Thread-safe.
class SharedRegion {
 public:
  // RESOURCE_EXHAUSTED: the limit of `use` is reached, or the system has no memory.
  // FAILED_PRECONDITION: the system cannot seal memory. The region must not outlive `engine`.
  static absl::StatusOr<std::shared_ptr<SharedRegion>> Create(model::PrefillEngine& engine,
                                                              std::shared_ptr<SharedMemoryUse> use,
                                                              size_t buffer_bytes, int num_buffers);
  ~SharedRegion();
  SharedRegion(const SharedRegion&) = delete;
  SharedRegion& operator=(const SharedRegion&) = delete;

  int descriptor() const { return descriptor_.get(); }
  size_t bytes() const { return bytes_; }
  std::vector<std::byte*> buffers() const;
  uint64_t OffsetOf(const std::byte* buffer) const {
    return static_cast<uint64_t>(buffer - memory_);
  }

  // Whether the consumer is there and has mapped the memory. While it is not, frames that lie in
  // it are sent with their payload.
  bool is_read() const { return is_read_.load(std::memory_order_acquire); }
  void set_is_read(bool is_read) { is_read_.store(is_read, std::memory_order_release); }

 private:
  SharedRegion(std::shared_ptr<SharedMemoryUse> use, size_t buffer_bytes, int num_buffers);

  const std::shared_ptr<SharedMemoryUse> use_;
  const size_t buffer_bytes_;
  const size_t bytes_;
  wire::Descriptor descriptor_;
  std::byte* memory_ = nullptr;
  model::DeviceBuffer pinned_;  // makes the device write to it fast
  std::atomic<bool> is_read_ = false;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_SHARED_REGION_H_
