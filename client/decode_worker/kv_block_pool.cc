#include "client/decode_worker/kv_block_pool.h"

#include <numeric>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace prefilld::client {

KvReservation::KvReservation(KvBlockPool* pool, std::vector<int32_t> blocks)
    : pool_(pool), blocks_(std::move(blocks)) {}

KvReservation::KvReservation(KvReservation&& other) noexcept
    : pool_(std::exchange(other.pool_, nullptr)), blocks_(std::move(other.blocks_)) {}

KvReservation& KvReservation::operator=(KvReservation&& other) noexcept {
  std::swap(pool_, other.pool_);
  std::swap(blocks_, other.blocks_);
  return *this;
}

KvReservation::~KvReservation() {
  if (pool_ != nullptr) pool_->Return(blocks_);
}

KvBlockPool::KvBlockPool(int64_t num_blocks) : num_blocks_(num_blocks), free_(num_blocks) {
  std::iota(free_.rbegin(), free_.rend(), 0);  // the lowest numbers go first
}

absl::StatusOr<KvReservation> KvBlockPool::Reserve(int64_t num_blocks) {
  absl::MutexLock lock(&mu_);
  if (num_blocks > static_cast<int64_t>(free_.size())) {
    return absl::ResourceExhaustedError(absl::StrCat("the request needs ", num_blocks,
                                                     " KV blocks; free are ", free_.size(), " of ",
                                                     num_blocks_));
  }
  std::vector<int32_t> blocks(free_.rbegin(), free_.rbegin() + num_blocks);
  free_.resize(free_.size() - num_blocks);
  return KvReservation(this, std::move(blocks));
}

int64_t KvBlockPool::free_blocks() const {
  absl::MutexLock lock(&mu_);
  return static_cast<int64_t>(free_.size());
}

void KvBlockPool::Return(absl::Span<const int32_t> blocks) {
  absl::MutexLock lock(&mu_);
  free_.insert(free_.end(), blocks.rbegin(), blocks.rend());
}

}  // namespace prefilld::client
