// The thread that checks what no other thread is awake for: timers of requests, ids that have
// become free, gauges, and liveness.
#ifndef PREFILLD_SERVER_WATCHDOG_H_
#define PREFILLD_SERVER_WATCHDOG_H_

#include <atomic>
#include <cstdint>
#include <optional>
#include <thread>

#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "server/clock.h"
#include "server/prefill_job.h"

namespace prefilld::model {
class PrefillEngine;
}

namespace prefilld::process {
class Health;
}

namespace prefilld::server {

class CacheWatch;
class Metrics;
class PrefillService;
class Scheduler;
class StagingRing;

// All parameters must outlive it.
class Watchdog {
 public:
  struct Watched {
    const model::PrefillEngine* engine;
    const StagingRing* ring;
    const Progress* progress;
    Scheduler* scheduler;
    process::Health* health;
    Metrics* metrics;
    PrefillService* service = nullptr;  // null: no request waits for its id
    CacheWatch* cache_watch = nullptr;  // null: nobody follows the prefix cache
  };

  Watchdog(const Watched& watched, const Clock& clock, const JobTimeouts& timeouts,
           absl::Duration wedge_timeout);
  ~Watchdog();

  // Shows from now on how long the drain has lasted. Thread-safe.
  void BeginDrain() { drain_began_us_ = absl::ToUnixMicros(clock_.Now()); }

  // Starts a thread that calls LookAround every few milliseconds. The destructor ends it.
  void Start();
  // Checks the timers of all live requests, sets the gauges, and reports a wedge when work has
  // waited for longer than the time-out without any progress. Not thread-safe.
  void LookAround();

 private:
  void Run();

  const Watched watched_;
  const Clock& clock_;
  const JobTimeouts timeouts_;
  const absl::Duration wedge_timeout_;
  bool wedged_ = false;
  std::atomic<int64_t> drain_began_us_ = 0;  // since the epoch; 0: there is no drain

  absl::Notification stop_;
  std::optional<std::thread> thread_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_WATCHDOG_H_
