#include "server/staging_ring.h"

#include <algorithm>
#include <utility>

#include "model/prefill/prefill_engine.h"
#include "proto/status_macros.h"
#include "server/shared_region.h"

namespace prefilld::server {
namespace {

constexpr size_t kCacheLineBytes = 64;

}  // namespace

StagingRing::Lease& StagingRing::Lease::operator=(Lease&& other) noexcept {
  std::swap(ring_, other.ring_);
  std::swap(credit_, other.credit_);
  std::swap(region_, other.region_);
  std::swap(data_, other.data_);
  return *this;
}

StagingRing::Lease::~Lease() {
  if (ring_ != nullptr) ring_->Return(*this);
}

absl::StatusOr<std::unique_ptr<StagingRing>> StagingRing::Create(model::PrefillEngine& engine,
                                                                 int num_buffers,
                                                                 size_t buffer_bytes,
                                                                 absl::Duration patience) {
  buffer_bytes = (buffer_bytes + kCacheLineBytes - 1) / kCacheLineBytes * kCacheLineBytes;
  PREFILLD_ASSIGN_OR_RETURN(model::DeviceBuffer memory,
                            engine.AllocateStaging(num_buffers * buffer_bytes));
  return std::unique_ptr<StagingRing>(
      new StagingRing(std::move(memory), num_buffers, buffer_bytes, patience));
}

StagingRing::StagingRing(model::DeviceBuffer memory, int num_buffers, size_t buffer_bytes,
                         absl::Duration patience)
    : memory_(std::move(memory)),
      num_buffers_(num_buffers),
      buffer_bytes_(buffer_bytes),
      patience_(patience) {
  for (int i = 0; i < num_buffers; ++i) {
    free_.push_back(memory_.as<std::byte>() + i * buffer_bytes);
  }
}

StagingRing::Lease StagingRing::Acquire(absl::Span<const std::shared_ptr<Credit>> credits,
                                        absl::FunctionRef<bool()> give_up) {
  absl::MutexLock lock(&mu_);
  const auto has_room = [this](const std::shared_ptr<Credit>& credit)
                            ABSL_SHARED_LOCKS_REQUIRED(mu_) {
                              if (credit->region_ != nullptr)
                                return !credit->region_->free_.empty();
                              return credit->held_ < static_cast<int64_t>(free_.size());
                            };
  const auto may_go_on = [&]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return std::any_of(credits.begin(), credits.end(), has_room) || give_up();
  };
  while (!mu_.AwaitWithTimeout(absl::Condition(&may_go_on), patience_)) {
  }
  const auto credit = std::find_if(credits.begin(), credits.end(), has_room);
  if (credit == credits.end()) return Lease();
  Credit& charged = **credit;
  std::vector<std::byte*>& free = charged.region_ != nullptr ? charged.region_->free_ : free_;
  std::byte* const data = free.back();
  free.pop_back();
  ++(charged.region_ != nullptr ? lent_buffers_ : charged.held_);
  return Lease(this, *credit, charged.region_, data);
}

// Taking and releasing the lock is enough: absl evaluates all waiting conditions on release.
void StagingRing::AskAgain() { absl::MutexLock lock(&mu_); }

void StagingRing::Lend(Credit& credit, std::shared_ptr<SharedRegion> region) {
  absl::MutexLock lock(&mu_);
  credit.region_ = std::move(region);
}

void StagingRing::TakeBack(Credit& credit) {
  std::shared_ptr<SharedRegion> region;  // let go after the lock
  absl::MutexLock lock(&mu_);
  region.swap(credit.region_);
}

bool StagingRing::AwaitBack(const SharedRegion& region, absl::Duration timeout) {
  absl::MutexLock lock(&mu_);
  const auto are_back = [&region] { return region.free_.size() == region.num_buffers_; };
  return mu_.AwaitWithTimeout(absl::Condition(&are_back), timeout);
}

void StagingRing::Return(Lease& lease) {
  absl::MutexLock lock(&mu_);
  if (lease.region_ == nullptr) {
    --lease.credit_->held_;
    free_.push_back(lease.data_);
    return;
  }
  --lent_buffers_;
  lease.region_->free_.push_back(lease.data_);
}

int64_t StagingRing::staged_bytes() const {
  absl::MutexLock lock(&mu_);
  return (num_buffers_ - static_cast<int64_t>(free_.size())) * buffer_bytes_;
}

bool StagingRing::AwaitIdle(absl::Duration timeout) {
  absl::MutexLock lock(&mu_);
  const auto idle = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return free_.size() == static_cast<size_t>(num_buffers_) && lent_buffers_ == 0;
  };
  return mu_.AwaitWithTimeout(absl::Condition(&idle), timeout);
}

}  // namespace prefilld::server
