// Looks after what no one else is awake for: timers of requests, gauges, and liveness.
#ifndef PREFILLD_SERVER_WATCHDOG_H_
#define PREFILLD_SERVER_WATCHDOG_H_

#include <thread>

#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "server/clock.h"
#include "server/prefill_job.h"

namespace prefilld::model {
class PrefillEngine;
}

namespace prefilld::server {

class Health;
class Metrics;
class Scheduler;
class StagingRing;

// A thread that looks around every few milliseconds. All it is given outlives it.
class Watchdog {
 public:
  struct Watched {
    const model::PrefillEngine* engine;
    const StagingRing* ring;
    Scheduler* scheduler;
    Health* health;
    Metrics* metrics;
  };

  Watchdog(const Watched& watched, const Clock& clock, const JobTimeouts& timeouts,
           absl::Duration wedge_timeout);
  ~Watchdog();

 private:
  void Run();
  void LookAround();

  const Watched watched_;
  const Clock& clock_;
  const JobTimeouts timeouts_;
  const absl::Duration wedge_timeout_;
  bool wedged_ = false;  // of the thread alone

  absl::Notification stop_;
  std::thread thread_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_WATCHDOG_H_
