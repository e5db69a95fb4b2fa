// Lets threads sleep until others have something for them.
#ifndef PREFILLD_SERVER_EVENT_COUNT_H_
#define PREFILLD_SERVER_EVENT_COUNT_H_

#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace prefilld::server {

// A sleeper reads count(), looks for work, and if it finds none, waits for the next event after
// that count. So an event that comes while it looks is not missed. Thread-safe.
class EventCount {
 public:
  int64_t count() const {
    absl::MutexLock lock(&mu_);
    return count_;
  }
  void Notify() {
    absl::MutexLock lock(&mu_);
    ++count_;
  }
  // Returns as soon as there has been an event after `count`, which may be at once.
  void AwaitAfter(int64_t count) {
    absl::MutexLock lock(&mu_);
    const auto is_later = [&]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return count_ != count; };
    mu_.Await(absl::Condition(&is_later));
  }

 private:
  mutable absl::Mutex mu_;
  int64_t count_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_EVENT_COUNT_H_
