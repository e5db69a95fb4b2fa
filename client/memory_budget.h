// Bounds the memory that a process makes for servers of its host (shared_memory.h).
#ifndef PREFILLD_CLIENT_MEMORY_BUDGET_H_
#define PREFILLD_CLIENT_MEMORY_BUDGET_H_

#include <atomic>
#include <cstddef>
#include <utility>

#include "absl/status/statusor.h"

namespace prefilld::client {

// A container that has no memory left is not refused more: the system ends a process of it. So
// calls that are made at once must not make as much as each can use. Thread-safe.
class MemoryBudget {
 public:
  explicit MemoryBudget(size_t bytes) : bytes_(bytes), left_(bytes) {}

  // A part of the budget, given back on destruction. The budget must outlive it. Move-only.
  class Share {
   public:
    Share() = default;
    Share(Share&& other) noexcept { *this = std::move(other); }
    Share& operator=(Share&& other) noexcept {
      std::swap(budget_, other.budget_);
      std::swap(bytes_, other.bytes_);
      return *this;
    }
    ~Share() {
      if (budget_ != nullptr) budget_->left_ += bytes_;
    }

   private:
    friend class MemoryBudget;
    Share(MemoryBudget* budget, size_t bytes) : budget_(budget), bytes_(bytes) {}

    MemoryBudget* budget_ = nullptr;
    size_t bytes_ = 0;
  };

  // RESOURCE_EXHAUSTED: so much is not left.
  absl::StatusOr<Share> Take(size_t bytes);

 private:
  const size_t bytes_;
  std::atomic<size_t> left_;
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_MEMORY_BUDGET_H_
