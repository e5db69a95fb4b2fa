#ifndef PREFILLD_CLIENT_DECODE_WORKER_KV_BLOCK_POOL_H_
#define PREFILLD_CLIENT_DECODE_WORKER_KV_BLOCK_POOL_H_

#include <cstdint>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"

namespace prefilld::client {

class KvBlockPool;

// Blocks that belong to one request until this is destroyed. Move-only.
class KvReservation {
 public:
  KvReservation() = default;
  KvReservation(KvReservation&& other) noexcept;
  KvReservation& operator=(KvReservation&& other) noexcept;
  ~KvReservation();

  // Returns the block table: the pool blocks in the order of the sequence's blocks.
  absl::Span<const int32_t> blocks() const { return blocks_; }

 private:
  friend class KvBlockPool;
  KvReservation(KvBlockPool* pool, std::vector<int32_t> blocks);

  KvBlockPool* pool_ = nullptr;
  std::vector<int32_t> blocks_;
};

// Keeps account of the decoder's free blocks. Thread-safe. It must outlive its reservations.
class KvBlockPool {
 public:
  explicit KvBlockPool(int64_t num_blocks);

  // Reserves all of the blocks or none, without waiting. RESOURCE_EXHAUSTED when fewer are free.
  absl::StatusOr<KvReservation> Reserve(int64_t num_blocks);

  int64_t num_blocks() const { return num_blocks_; }
  int64_t free_blocks() const;

 private:
  friend class KvReservation;
  void Return(absl::Span<const int32_t> blocks);

  const int64_t num_blocks_;
  mutable absl::Mutex mu_;
  std::vector<int32_t> free_ ABSL_GUARDED_BY(mu_);
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_DECODE_WORKER_KV_BLOCK_POOL_H_
