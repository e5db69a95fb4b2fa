// The time, as an interface so that tests can move it.
#ifndef PREFILLD_SERVER_CLOCK_H_
#define PREFILLD_SERVER_CLOCK_H_

#include "absl/time/time.h"

namespace prefilld::server {

class Clock {
 public:
  virtual ~Clock() = default;
  virtual absl::Time Now() const = 0;  // thread-safe, never goes back

  // Wall time at the start of the process, advanced by the monotonic clock from there on: an
  // adjustment of the system's clock is no time-out.
  static const Clock& Real();
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_CLOCK_H_
