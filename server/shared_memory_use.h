// How much memory of consumers the server has mapped, and for whom.
#ifndef PREFILLD_SERVER_SHARED_MEMORY_USE_H_
#define PREFILLD_SERVER_SHARED_MEMORY_USE_H_

#include <cstdint>
#include <memory>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"

namespace prefilld::server {

// The memory belongs to the consumers. What is bounded here is the address space that it takes in
// the server, what is pinned of it for a GPU, and the connections and threads that go with it.
//
// If tenants share the server, each may have no more than is left for the others, of bytes and of
// connections: so one has half of all at most, and of two each a third, with a third left.
//
// Thread-safe.
class SharedMemoryUse {
 public:
  struct Limits {
    int64_t bytes = 0;        // of all memories together
    int64_t attachments = 0;  // memories
    bool is_shared_by_tenants = false;
  };
  struct Amount {
    int64_t bytes = 0;
    int64_t attachments = 0;
  };

  // The charge for one memory, given back on destruction. Move-only.
  class Share {
   public:
    Share() = default;
    Share(Share&& other) noexcept { *this = std::move(other); }
    Share& operator=(Share&& other) noexcept {
      std::swap(use_, other.use_);
      std::swap(tenant_, other.tenant_);
      std::swap(bytes_, other.bytes_);
      return *this;
    }
    ~Share();

    // Charges it to another tenant, because the consumer's next request is that one's.
    // RESOURCE_EXHAUSTED: that tenant may have no more, and the charge stays where it is.
    absl::Status MoveTo(int tenant);

   private:
    friend class SharedMemoryUse;
    std::shared_ptr<SharedMemoryUse> use_;
    int tenant_ = 0;
    int64_t bytes_ = 0;
  };

  explicit SharedMemoryUse(const Limits& limits) : limits_(limits) {}

  // Charges a memory to a tenant. RESOURCE_EXHAUSTED names the limit that is reached.
  static absl::StatusOr<Share> Take(const std::shared_ptr<SharedMemoryUse>& use, int tenant,
                                    int64_t bytes);
  Amount total() const;
  // Tells whether more than half of the memories are attached that may be.
  bool is_half_taken() const;

 private:
  absl::Status CheckTenant(int tenant, int64_t bytes, const Amount& total_then) const
      ABSL_SHARED_LOCKS_REQUIRED(mu_);
  void Add(int tenant, int64_t bytes, int64_t attachments) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Limits limits_;
  mutable absl::Mutex mu_;
  Amount total_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<int, Amount> of_tenants_ ABSL_GUARDED_BY(mu_);  // those that have some
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_SHARED_MEMORY_USE_H_
