#include "server/watchdog.h"

#include "model/prefill/prefill_engine.h"
#include "proto/process/health.h"
#include "proto/process/log.h"
#include "server/cache_watch.h"
#include "server/metrics.h"
#include "server/prefill_service.h"
#include "server/scheduler.h"
#include "server/staging_ring.h"

namespace prefilld::server {
namespace {

constexpr absl::Duration kTick = absl::Milliseconds(20);

}  // namespace

Watchdog::Watchdog(const Watched& watched, const Clock& clock, const JobTimeouts& timeouts,
                   absl::Duration wedge_timeout)
    : watched_(watched), clock_(clock), timeouts_(timeouts), wedge_timeout_(wedge_timeout) {}

Watchdog::~Watchdog() {
  stop_.Notify();
  if (thread_.has_value()) thread_->join();
}

void Watchdog::Start() {
  thread_.emplace([this] { Run(); });
}

void Watchdog::Run() {
  do {
    LookAround();
  } while (!stop_.WaitForNotificationWithTimeout(kTick));
}

void Watchdog::LookAround() {
  for (const LiveJob& live : watched_.scheduler->LiveJobs()) {
    live.job->CheckTimers(timeouts_, live.requests_ahead, live.others_wait);
  }

  watched_.scheduler->AdmitReceivers();
  if (watched_.service != nullptr) watched_.service->RetryWaiting();
  if (watched_.cache_watch != nullptr) watched_.cache_watch->SendNews();

  const QueueState queue = watched_.scheduler->state();
  const absl::Duration silence =
      queue.work_waits ? clock_.Now() - watched_.progress->last() : absl::ZeroDuration();
  const bool wedged = silence > wedge_timeout_;
  if (wedged != wedged_) {
    wedged_ = wedged;
    process::LogEvent(wedged ? process::LogLevel::kError : process::LogLevel::kInfo,
                      wedged ? "wedged" : "progress_again",
                      {{"without_progress_s", absl::ToDoubleSeconds(silence)}});
  }
  watched_.health->SetProgressing(!wedged);
  if (!watched_.scheduler->failure().ok()) watched_.health->SetReady(false);

  const int64_t drain_began = drain_began_us_;
  watched_.metrics->Set({.queued_requests = queue.queued_requests,
                         .queued_tokens = queue.queued_tokens,
                         .running_requests = queue.running_requests,
                         .ended_in_passes = queue.ended_in_passes,
                         .computing = queue.computing,
                         .live_requests = queue.live_requests,
                         .staged_bytes = watched_.ring->staged_bytes(),
                         .staging_capacity_bytes = watched_.ring->capacity_bytes(),
                         .device_bytes = static_cast<int64_t>(watched_.engine->allocated_bytes()),
                         .resident_tokens = watched_.engine->resident_tokens(),
                         .recorded_layers = watched_.engine->num_recordings(),
                         .prefix_cache = watched_.engine->prefix_cache(),
                         .ready = watched_.health->ready(),
                         .live = watched_.health->live(),
                         .progressing = watched_.health->progressing(),
                         .draining = drain_began == 0
                                         ? absl::ZeroDuration()
                                         : clock_.Now() - absl::FromUnixMicros(drain_began),
                         .queued_of_tenants = queue.queued_of_tenants});
}

}  // namespace prefilld::server
