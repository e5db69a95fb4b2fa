// The queue of requests, the pass that computes, and the thread that steps it.
#ifndef PREFILLD_SERVER_SCHEDULER_H_
#define PREFILLD_SERVER_SCHEDULER_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/admission.h"
#include "server/event_count.h"
#include "server/prefill_job.h"
#include "server/prefill_pass.h"
#include "server/prompt_speed.h"

namespace prefilld::model {
class PrefillEngine;
}

namespace prefilld::server {

struct QueueState {
  int64_t queued_requests = 0;
  int64_t queued_tokens = 0;
  int64_t running_requests = 0;  // those of the running pass that have not ended
  int64_t live_requests = 0;     // queued, running, or still being sent
  bool work_waits = false;       // a pass runs, or could
};

struct LiveJob {
  std::shared_ptr<PrefillJob> job;
  int64_t requests_ahead = 0;
  bool others_wait = false;  // for the compute or the staging that it may hold
};

// Requests wait in the order of their arrival, and one pass computes at a time. The rules in
// admission.h decide who may wait and which prompts make up the next pass.
//
// The scheduler has no thread of its own: the compute thread calls StepOnce, and any thread may
// call everything else.
class Scheduler {
 public:
  // All parameters are borrowed. `wake` is notified when there may be something to compute.
  Scheduler(model::PrefillEngine& engine, const PassResources& resources, EventCount& wake,
            const QueueLimits& limits);
  // No job may be live.
  ~Scheduler();

  struct Admission {
    absl::Status status;
    std::optional<absl::Duration> retry_after;  // with RESOURCE_EXHAUSTED
  };
  // Takes the job in and sends Accepted. Errors:
  // - RESOURCE_EXHAUSTED: the queue is full.
  // - DEADLINE_EXCEEDED: the deadline is out of reach.
  // - ALREADY_EXISTS: a live request has this id.
  // - UNAVAILABLE: the scheduler is closed.
  Admission Submit(std::shared_ptr<PrefillJob> job);
  // Ends the life of a job whose call is over. The job leaves the queue if it is still there.
  void Retire(PrefillJob& job);

  // Computes one step of the running pass, or starts the next one. Returns false when nothing can
  // be computed before `wake` is notified. Only the compute thread may call it.
  bool StepOnce();

  std::shared_ptr<PrefillJob> Find(const std::string& id) const;  // null: no such live request
  std::vector<LiveJob> LiveJobs() const;
  QueueState state() const;

  // Closes the scheduler: from now on Submit answers UNAVAILABLE with this reason.
  void Close(const std::string& reason);
  void AbortAll(Outcome outcome, const absl::Status& status);
  // Waits until no job is live. Returns false when the time ran out.
  bool AwaitIdle(absl::Duration timeout);

  // Returns an error once the device has failed. Every request has been ended with UNAVAILABLE
  // then.
  absl::Status failure() const;

 private:
  using Jobs = std::vector<std::shared_ptr<PrefillJob>>;

  WaitingPrompt Describe(const PrefillJob& job) const;
  WaitingLine Line() const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  int64_t RunningBeside(const PrefillJob* job) const ABSL_SHARED_LOCKS_REQUIRED(mu_);

  Jobs TakeNextJobs();  // jobs of the next pass; empty: none wait
  void StartPass(Jobs jobs);
  PrefillPass::Next StepPass();
  void RecordSpeed(absl::Duration compute);
  void Fail(const absl::Status& cause);

  model::PrefillEngine& engine_;
  const PassResources resources_;
  EventCount& wake_;
  const QueueLimits limits_;

  mutable absl::Mutex mu_;
  std::string closed_ ABSL_GUARDED_BY(mu_);  // reason; empty: open
  absl::Status failure_ ABSL_GUARDED_BY(mu_);
  std::deque<std::shared_ptr<PrefillJob>> queue_ ABSL_GUARDED_BY(mu_);
  int64_t queued_tokens_ ABSL_GUARDED_BY(mu_) = 0;
  Jobs running_ ABSL_GUARDED_BY(mu_);  // of pass_ and of starting_
  absl::flat_hash_map<std::string, std::shared_ptr<PrefillJob>> live_ ABSL_GUARDED_BY(mu_);
  PromptSpeed speed_ ABSL_GUARDED_BY(mu_);

  // Only the compute thread uses the members from here on. Jobs that were taken out of the queue
  // are started as one pass, or one by one if the engine refuses that.
  std::deque<Jobs> starting_;
  std::unique_ptr<PrefillPass> pass_;  // null: none runs
};

// The thread that steps a scheduler. It sleeps when there is nothing to compute.
class ComputeThread {
 public:
  ComputeThread(Scheduler& scheduler, EventCount& wake);
  // Returns after the current step.
  ~ComputeThread();

 private:
  void Run();

  Scheduler& scheduler_;
  EventCount& wake_;
  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_SCHEDULER_H_
