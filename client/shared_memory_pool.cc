#include "client/shared_memory_pool.h"

#include <algorithm>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/time/clock.h"

namespace prefilld::client {

using ::prefill::v1::Accepted;
using ::prefill::v1::SharedMemoryOffer;

SharedMemoryPool::~SharedMemoryPool() {
  std::thread dropping;
  {
    absl::MutexLock lock(&mu_);
    stops_ = true;
    dropping.swap(dropping_);
  }
  if (dropping.joinable()) dropping.join();
}

// A memory that the server no longer has, or is not done with, is replaced by a new one.
absl::StatusOr<std::unique_ptr<SharedMemory>> SharedMemoryPool::Attach(const Accepted& accepted) {
  // A call without an offer takes no memory that a later one may use.
  if (accepted.shared_memory().bytes() == 0) return SharedMemory::Attach(accepted);
  if (auto memory = Take(accepted.shared_memory()); memory != nullptr) {
    const absl::Status again = memory->AttachAgain(accepted);
    if (again.ok()) return memory;
    if (!absl::IsUnavailable(again) && !absl::IsAborted(again)) return again;
  }
  return SharedMemory::Attach(accepted);
}

// If none suits, the one that was used longest ago makes room for the new one that will be kept.
std::unique_ptr<SharedMemory> SharedMemoryPool::Take(const SharedMemoryOffer& offer) {
  Kept taken;  // or dropped, after the lock
  absl::MutexLock lock(&mu_);
  if (kept_.empty()) return nullptr;
  const auto suits = std::find_if(kept_.begin(), kept_.end(),
                                  [&offer](const Kept& kept) { return kept.memory->Suits(offer); });
  const bool any_suits = suits != kept_.end();
  const auto chosen = any_suits ? suits : std::prev(kept_.end());
  taken = std::move(*chosen);
  kept_.erase(chosen);
  return any_suits ? std::move(taken.memory) : nullptr;
}

void SharedMemoryPool::Keep(std::unique_ptr<SharedMemory> memory) {
  if (!memory->is_heard()) return;
  std::list<Kept> dropped;  // after the lock
  absl::MutexLock lock(&mu_);
  try {
    if (!dropping_.joinable()) dropping_ = std::thread([this] { DropIdle(); });
  } catch (const std::system_error&) {
    return;  // no more threads may be made, and nothing is kept that nobody would drop
  }
  kept_.push_front({std::move(memory), absl::Now() + longest_idle_});
  if (kept_.size() > kMostKept) dropped.splice(dropped.end(), kept_, std::prev(kept_.end()));
}

void SharedMemoryPool::DropIdle() {
  const auto has_work = [this]()
                            ABSL_SHARED_LOCKS_REQUIRED(mu_) { return stops_ || !kept_.empty(); };
  while (true) {
    std::list<Kept> dropped;  // after the lock
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(&has_work));
    if (stops_) return;
    const absl::Time due = kept_.back().until;
    const auto is_stopped = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return stops_; };
    if (mu_.AwaitWithDeadline(absl::Condition(&is_stopped), due)) return;
    const absl::Time now = absl::Now();
    while (!kept_.empty() && kept_.back().until <= now) {
      dropped.splice(dropped.end(), kept_, std::prev(kept_.end()));
    }
  }
}

}  // namespace prefilld::client
