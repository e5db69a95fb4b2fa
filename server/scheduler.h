// Who computes when: admission, a bounded first-come queue, and the compute thread.
#ifndef PREFILLD_SERVER_SCHEDULER_H_
#define PREFILLD_SERVER_SCHEDULER_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/admission.h"
#include "server/clock.h"
#include "server/prefill_job.h"
#include "server/prefill_pass.h"
#include "server/prompt_speed.h"

namespace prefilld::model {
class PrefillEngine;
}

namespace prefilld::server {

class KvStream;
class Metrics;

struct QueueState {
  int64_t queued_requests = 0;
  int64_t queued_tokens = 0;
  int64_t running_requests = 0;  // those of the running pass that have not ended
  int64_t live_requests = 0;     // queued, running, or still being sent
};

struct LiveJob {
  std::shared_ptr<PrefillJob> job;
  int64_t requests_ahead = 0;
  bool others_wait = false;  // for the compute or the staging that it may hold
};

// Requests wait in the order of their arrival, and one pass computes at a time. Who may wait, and
// which prompts make up the next pass, is decided by the rules in admission.h. Thread-safe.
class Scheduler {
 public:
  Scheduler(model::PrefillEngine& engine, KvStream& stream, Metrics& metrics, const Clock& clock,
            const QueueLimits& limits, const JobTimeouts& timeouts);
  // Stops the compute thread after its current step. No job may be live.
  ~Scheduler();

  // Takes the job in and sends Accepted. RESOURCE_EXHAUSTED with a RetryInfo payload: the queue is
  // full; DEADLINE_EXCEEDED: it is out of reach; ALREADY_EXISTS: a live request has this id;
  // UNAVAILABLE: closed.
  absl::Status Submit(std::shared_ptr<PrefillJob> job);
  // The job's call is over; it leaves the queue if it is still there.
  void Retire(PrefillJob& job);

  std::shared_ptr<PrefillJob> Find(const std::string& id) const;  // null: no such live request
  std::vector<LiveJob> LiveJobs() const;
  QueueState state() const;

  // From now on Submit answers UNAVAILABLE with this reason.
  void Close(const std::string& reason);
  void AbortAll(Outcome outcome, const absl::Status& status);
  // Waits until nothing is live. False: the time ran out.
  bool AwaitIdle(absl::Duration timeout);

  // Not OK once the device has failed; every request has been ended with UNAVAILABLE then.
  absl::Status failure() const;
  // Something other than the compute thread got done for the running request.
  void RecordProgress();
  // For how long work has waited without any progress.
  absl::Duration WithoutProgressFor(absl::Time now) const;

 private:
  using Jobs = std::vector<std::shared_ptr<PrefillJob>>;

  void Run();
  Jobs NextJobs();  // of a pass; none: stop
  WaitingPrompt Describe(const PrefillJob& job) const;
  WaitingLine Line() const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  int64_t RunningBeside(const PrefillJob* job) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Compute(Jobs jobs);
  void RecordSpeed(const PrefillPass& pass, absl::Duration compute);
  void Fail(const absl::Status& cause);

  model::PrefillEngine& engine_;
  Metrics& metrics_;
  const Clock& clock_;
  const QueueLimits limits_;
  const PassResources pass_resources_;

  std::atomic<int64_t> progress_at_us_;  // since the epoch

  mutable absl::Mutex mu_;
  bool stop_ ABSL_GUARDED_BY(mu_) = false;
  std::string closed_ ABSL_GUARDED_BY(mu_);  // reason; empty: open
  absl::Status failure_ ABSL_GUARDED_BY(mu_);
  std::deque<std::shared_ptr<PrefillJob>> queue_ ABSL_GUARDED_BY(mu_);
  int64_t queued_tokens_ ABSL_GUARDED_BY(mu_) = 0;
  Jobs running_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<std::string, std::shared_ptr<PrefillJob>> live_ ABSL_GUARDED_BY(mu_);
  PromptSpeed speed_ ABSL_GUARDED_BY(mu_);

  std::thread thread_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_SCHEDULER_H_
