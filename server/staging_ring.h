// Host memory for KV on its way to consumers: a fixed number of equal buffers, lent one by one.
//
// The ring bounds what slow consumers can hold. Each request has a credit of its own, so that
// requests whose consumers stand still leave room for the others.
#ifndef PREFILLD_SERVER_STAGING_RING_H_
#define PREFILLD_SERVER_STAGING_RING_H_

#include <atomic>
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

class SharedRegion;

// Thread-safe. Must outlive its leases (AwaitIdle).
class StagingRing {
 public:
  // Counts the buffers that one request holds.
  class Credit {
   public:
    // Tells whether the consumer reads the memory that was lent to the request. While it does not,
    // frames that lie there are sent with their payload.
    bool is_read_in_place() const { return is_read_in_place_.load(std::memory_order_acquire); }
    void set_is_read_in_place(bool is_read) {
      is_read_in_place_.store(is_read, std::memory_order_release);
    }

   private:
    friend class StagingRing;
    std::atomic<bool> is_read_in_place_ = false;
    // The ring's lock guards these.
    int held_ = 0;  // of the ring
    // The request has buffers of its own, and is not charged to the ring's.
    std::shared_ptr<SharedRegion> region_;
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
    // The request's own memory, in which the buffer lies; null: it is the ring's.
    const SharedRegion* region() const { return region_.get(); }

   private:
    friend class StagingRing;
    Lease(StagingRing* ring, std::shared_ptr<Credit> credit, std::shared_ptr<SharedRegion> region,
          std::byte* data)
        : ring_(ring), credit_(std::move(credit)), region_(std::move(region)), data_(data) {}

    StagingRing* ring_ = nullptr;
    std::shared_ptr<Credit> credit_;  // co-owned by the request, which may end first
    std::shared_ptr<SharedRegion> region_;
    std::byte* data_ = nullptr;
  };

  // Allocates num_buffers (at least 2) of buffer_bytes, rounded up to whole cache lines, in the
  // engine's staging memory, so that numbers of every type may begin where a buffer does. While
  // Acquire waits, it asks every `patience` whether to give up, because any thread may end a
  // request without bringing a buffer back.
  static absl::StatusOr<std::unique_ptr<StagingRing>> Create(
      model::PrefillEngine& engine, int num_buffers, size_t buffer_bytes,
      absl::Duration patience = absl::Milliseconds(5));

  // Waits for a buffer and charges it to the first of `credits` that has room, which means that it
  // holds fewer buffers than are free. So one request can hold half the ring, or two a third each
  // with a third left for others.
  //
  // A request to which memory was lent gets buffers of that alone, each of which holds its frames.
  //
  // Returns an empty lease when `give_up` returned true. It is asked under the ring's lock: at
  // once, whenever a buffer comes back, at AskAgain and every `patience`.
  Lease Acquire(absl::Span<const std::shared_ptr<Credit>> credits,
                absl::FunctionRef<bool()> give_up);
  // Makes those who wait in Acquire ask again whether to give up.
  void AskAgain();

  // Gives a request memory of its own, and takes it away again. Buffers that are on loan then stay
  // so until they come back to the memory, which one request has at a time.
  void Lend(Credit& credit, std::shared_ptr<SharedRegion> region);
  void TakeBack(Credit& credit);
  // Waits until every buffer of a memory is back. Returns false when the time ran out.
  bool AwaitBack(const SharedRegion& region, absl::Duration timeout);

  size_t buffer_bytes() const { return buffer_bytes_; }
  int64_t capacity_bytes() const { return int64_t{num_buffers_} * buffer_bytes_; }
  int64_t staged_bytes() const;  // bytes of its own buffers on loan

  // Waits until every buffer is back, those of requests' own memory included. Returns false when
  // the time ran out.
  bool AwaitIdle(absl::Duration timeout);

 private:
  StagingRing(model::DeviceBuffer memory, int num_buffers, size_t buffer_bytes,
              absl::Duration patience);
  void Return(Lease& lease);

  const model::DeviceBuffer memory_;
  const int num_buffers_;
  const size_t buffer_bytes_;
  const absl::Duration patience_;

  mutable absl::Mutex mu_;
  std::vector<std::byte*> free_ ABSL_GUARDED_BY(mu_);
  int lent_buffers_ ABSL_GUARDED_BY(mu_) = 0;  // on loan, of requests' own memory
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_STAGING_RING_H_
