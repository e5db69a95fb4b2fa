#include "server/resumable_jobs.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "server/prefill_job.h"
#include "server/resumption_metrics.h"
#include "server/staging_ring.h"

namespace prefilld::server {
namespace {

struct Waiting {
  std::shared_ptr<PrefillJob> job;
  bool is_done = false;  // its consumer may only have forgotten to say so
  absl::Duration away;
  int64_t held_bytes = 0;  // of staging memory: whole buffers
};

bool IsOver(const PrefillJob& job, const LaneQueue& control) {
  return job.ended() && !control.has_transport();
}

}  // namespace

ResumableJobs::ResumableJobs(ResumptionMetrics& metrics, const Clock& clock,
                             const StagingRing& ring, std::function<void(PrefillJob&)> on_over)
    : metrics_(metrics), clock_(clock), ring_(ring), on_over_(std::move(on_over)) {}

void ResumableJobs::Add(std::shared_ptr<PrefillJob> job) {
  job->set_outlives_call();
  absl::MutexLock lock(&mu_);
  jobs_.push_back(std::move(job));
}

void ResumableJobs::AddPush(std::shared_ptr<PrefillJob> push) {
  if (push->outlives_call()) return;  // it was taken in by Add
  absl::MutexLock lock(&mu_);
  pushes_.push_back(std::move(push));
}

void ResumableJobs::LookAround() {
  std::vector<std::shared_ptr<PrefillJob>> going_on, over;
  {
    absl::MutexLock lock(&mu_);
    for (auto& job : jobs_) {
      (IsOver(*job, job->delivery().control()) ? over : going_on).push_back(std::move(job));
    }
    jobs_ = going_on;
    pushes_.erase(std::remove_if(pushes_.begin(), pushes_.end(),
                                 [](const auto& push) { return push->ended(); }),
                  pushes_.end());
    going_on.insert(going_on.end(), pushes_.begin(), pushes_.end());
  }
  for (const auto& job : over) on_over_(*job);
  BoundWaiting(going_on);
}

void ResumableJobs::BoundWaiting(const std::vector<std::shared_ptr<PrefillJob>>& jobs) {
  std::vector<Waiting> waiting;
  int64_t retained_frames = 0;
  for (const auto& job : jobs) {
    if (job->ended()) continue;  // its streams are still to end
    const Delivery::ConsumerState consumer = job->delivery().consumer(clock_.Now());
    retained_frames += consumer.held_frames.all;
    const absl::Duration away = std::max(consumer.away, consumer.receiver_away);
    if (away <= absl::ZeroDuration()) continue;
    waiting.push_back({job, job->delivery().result_is_out(), away,
                       consumer.held_frames.staged * static_cast<int64_t>(ring_.buffer_bytes())});
  }
  std::stable_sort(waiting.begin(), waiting.end(), [](const Waiting& a, const Waiting& b) {
    return std::pair(a.is_done, b.away) < std::pair(b.is_done, a.away);
  });
  // One request may hold as much, rounded as its credit is.
  const auto max_bytes = static_cast<int64_t>(ring_.capacity_bytes() + ring_.buffer_bytes()) / 2;
  std::map<int, int64_t> kept_of_tenant;
  int64_t kept = 0, kept_bytes = 0;
  for (const Waiting& entry : waiting) {
    int64_t& of_tenant = kept_of_tenant[entry.job->work().tenant];
    if (kept < static_cast<int64_t>(kMaxWaiting) &&
        of_tenant < static_cast<int64_t>(kMaxWaitingOfTenant) &&
        kept_bytes + entry.held_bytes <= max_bytes) {
      ++kept;
      ++of_tenant;
      kept_bytes += entry.held_bytes;
      continue;
    }
    if (!entry.is_done) metrics_.CountRefused();
    entry.job->GiveUpConsumer(absl::ResourceExhaustedError(
        absl::StrCat("the connection broke, and of such requests at most ", kMaxWaiting,
                     " are kept, ", kMaxWaitingOfTenant, " of a tenant, with at most ",
                     max_bytes >> 20, " MiB of staging memory")));
  }
  metrics_.SetWaiting(kept, kept_bytes, retained_frames);
}

}  // namespace prefilld::server
