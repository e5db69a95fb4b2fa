// Memories that stay attached to a server between the calls of a client.
#ifndef PREFILLD_CLIENT_SHARED_MEMORY_POOL_H_
#define PREFILLD_CLIENT_SHARED_MEMORY_POOL_H_

#include <cstddef>
#include <list>
#include <memory>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/shared_memory.h"
#include "prefill/v1/prefill.pb.h"

namespace prefilld::client {

// To make a memory, map it at both ends and pin it for a GPU takes milliseconds, so calls use one
// after the other. Few are kept, and not for long: a thread, which the first memory that is kept
// starts, drops those that nobody has used. Thread-safe.
class SharedMemoryPool {
 public:
  explicit SharedMemoryPool(absl::Duration longest_idle = kLongestIdle)
      : longest_idle_(longest_idle) {}
  ~SharedMemoryPool();

  // Attaches a memory to a call that was accepted: one that is kept, else a new one
  // (SharedMemory::Attach).
  absl::StatusOr<std::unique_ptr<SharedMemory>> Attach(const ::prefill::v1::Accepted& accepted);
  // Takes back the memory of a call of which everything has come.
  void Keep(std::unique_ptr<SharedMemory> memory);

  static constexpr size_t kMostKept = 4;
  // A server lets go after 20 s.
  static constexpr absl::Duration kLongestIdle = absl::Seconds(10);

 private:
  struct Kept {
    std::unique_ptr<SharedMemory> memory;
    absl::Time until;
  };

  std::unique_ptr<SharedMemory> Take(const ::prefill::v1::SharedMemoryOffer& offer);
  void DropIdle();

  const absl::Duration longest_idle_;
  absl::Mutex mu_;
  std::list<Kept> kept_ ABSL_GUARDED_BY(mu_);  // the latest one first
  bool stops_ ABSL_GUARDED_BY(mu_) = false;
  std::thread dropping_ ABSL_GUARDED_BY(mu_);
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_SHARED_MEMORY_POOL_H_
