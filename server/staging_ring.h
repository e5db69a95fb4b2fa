// Host memory for KV on its way to consumers: a fixed number of equal buffers, lent one by one.
//
// This is the bound on what slow consumers can hold. Each request has a credit of its own, so
// that those that stand still leave room for the others.
#ifndef PREFILLD_SERVER_STAGING_RING_H_
#define PREFILLD_SERVER_STAGING_RING_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "model/device/device.h"

namespace prefilld::model {
class PrefillEngine;
}

namespace prefilld::server {

// Thread-safe. Must outlive its leases (AwaitIdle).
class StagingRing {
 public:
  // Counts the buffers that one request holds. Guarded by the ring's lock.
  class Credit {
   private:
    friend class StagingRing;
    int held_ = 0;
  };

  // One buffer on loan, given back on destruction. Move-only.
  class Lease {
   public:
    Lease() = default;
    Lease(Lease&& other) noexcept { *this = std::move(other); }
    Lease& operator=(Lease&& other) noexcept;
    ~Lease();

    explicit operator bool() const { return ring_ != nullptr; }
    std::byte* data() const { return data_; }
    const Credit* credit() const { return credit_.get(); }

   private:
    friend class StagingRing;
    Lease(StagingRing* ring, std::shared_ptr<Credit> credit, std::byte* data)
        : ring_(ring), credit_(std::move(credit)), data_(data) {}

    StagingRing* ring_ = nullptr;
    std::shared_ptr<Credit> credit_;  // co-owned by the request, which may end first
    std::byte* data_ = nullptr;
  };

  // Allocates num_buffers (at least 2) of buffer_bytes in the engine's staging memory. `patience`
  // is how long Acquire waits before it asks by itself whether to give up: anyone may end a
  // request, and the end need not bring a buffer back.
  static absl::StatusOr<std::unique_ptr<StagingRing>> Create(
      model::PrefillEngine& engine, int num_buffers, size_t buffer_bytes,
      absl::Duration patience = absl::Milliseconds(5));

  // Waits for a buffer within the credit of a request, of the first of `credits` that has room: it
  // holds less than is free. So one request gets half the ring, two a third each, and a last third
  // is left for others. An empty lease means that `give_up` returned true; it is asked under the
  // ring's lock, now, whenever a buffer comes back, at AskAgain and every `patience`.
  Lease Acquire(absl::Span<const std::shared_ptr<Credit>> credits,
                absl::FunctionRef<bool()> give_up);
  // Asks those who wait in Acquire again whether to give up.
  void AskAgain();

  size_t buffer_bytes() const { return buffer_bytes_; }
  int64_t capacity_bytes() const { return int64_t{num_buffers_} * buffer_bytes_; }
  int64_t staged_bytes() const;  // in buffers on loan

  // Waits until every buffer is back. False: the time ran out.
  bool AwaitIdle(absl::Duration timeout);

 private:
  StagingRing(model::DeviceBuffer memory, int num_buffers, size_t buffer_bytes,
              absl::Duration patience);
  void Return(Credit& credit, std::byte* data);

  const model::DeviceBuffer memory_;
  const int num_buffers_;
  const size_t buffer_bytes_;
  const absl::Duration patience_;

  mutable absl::Mutex mu_;
  std::vector<std::byte*> free_ ABSL_GUARDED_BY(mu_);
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_STAGING_RING_H_
