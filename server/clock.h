// Time as an interface, so that tests can move it, and a record of when work last made progress.
#ifndef PREFILLD_SERVER_CLOCK_H_
#define PREFILLD_SERVER_CLOCK_H_

#include <atomic>
#include <cstdint>

#include "absl/time/time.h"

namespace prefilld::server {

class Clock {
 public:
  virtual ~Clock() = default;
  virtual absl::Time Now() const = 0;  // thread-safe, never goes back

  // Real time: the wall time at the start of the process, advanced by the monotonic clock. So an
  // adjustment of the system's clock causes no time-out.
  static const Clock& Real();
};

// Remembers when something was last done for any request: a step computed or a frame handed over.
// The threads that work record it, and the watchdog reads it. Thread-safe.
class Progress {
 public:
  explicit Progress(const Clock& clock) : clock_(clock) { Record(); }

  void Record() { last_us_.store(absl::ToUnixMicros(clock_.Now()), std::memory_order_relaxed); }
  absl::Time last() const { return absl::FromUnixMicros(last_us_.load(std::memory_order_relaxed)); }

 private:
  const Clock& clock_;
  std::atomic<int64_t> last_us_;  // since the epoch
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_CLOCK_H_
