// The queue of requests, the passes that take turns computing, and the thread that steps them.
#ifndef PREFILLD_SERVER_SCHEDULER_H_
#define PREFILLD_SERVER_SCHEDULER_H_

#include <algorithm>
#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "server/admission.h"
#include "server/event_count.h"
#include "server/prefill_job.h"
#include "server/prefill_pass.h"
#include "server/prompt_speed.h"
#include "server/standings.h"
#include "server/tenants.h"
#include "server/turns.h"

namespace prefilld::model {
class PrefillEngine;
struct PrefixCacheUse;
}  // namespace prefilld::model

namespace prefilld::server {

struct QueueState {
  int64_t queued_requests = 0;
  int64_t queued_tokens = 0;
  int64_t running_requests = 0;  // those of the passes under way that somebody still wants
  // Those of the passes under way that have ended: the device may compute a part of a layer for
  // nobody.
  int64_t ended_in_passes = 0;
  bool computing = false;     // a step is being computed
  int64_t live_requests = 0;  // queued, running, or still being sent; further receivers included
  bool work_waits = false;    // a pass runs, or could
  std::vector<int64_t> queued_of_tenants;  // requests; [tenants]
};

struct LiveJob {
  std::shared_ptr<PrefillJob> job;
  int64_t requests_ahead = 0;
  bool others_wait = false;  // for its place in the engine, or for the layers of its own batch
};

// Several passes may be under way, as many as the engine has memory for, and they take turns step
// by step: the rule of turns.h chooses between those under way and the prompts that wait. It shares
// the device between tenants by what each step took (fair_shares.h); a step of a batch counts to
// the tenants of its prompts by their tokens. Short dense prompts also take turns at the points
// inside a layer of a long one, for half a second, or for half of the time if the layer takes
// longer. So a short dense prompt waits for a part of a layer, any other prompt for one layer and
// that time, and a pass whose consumers are slow holds up nobody. One prompt at a time may take a
// place in the engine while its receivers are awaited; others whose receivers have not come wait in
// the queue meanwhile. The rules in admission.h decide who may wait and which prompts share a pass.
//
// The scheduler has no thread of its own: the compute thread calls StepOnce, and any thread may
// call everything else.
class Scheduler {
 public:
  // All parameters are borrowed. `wake` is notified when there may be something to compute.
  Scheduler(model::PrefillEngine& engine, const PassResources& resources, EventCount& wake,
            const QueueLimits& limits, Scheduling scheduling = Scheduling::kTurns);
  // No job may be live.
  ~Scheduler();

  struct Admission {
    absl::Status status;
    std::optional<absl::Duration> retry_after;  // with RESOURCE_EXHAUSTED
  };
  // Takes over the tenants of a new table, which has those of the one before at their positions. It
  // holds for requests that come from now on, and weights at the next turn.
  void SetTenants(absl::Span<const Tenant> tenants);

  // Takes the job in and sends Accepted. Errors:
  // - RESOURCE_EXHAUSTED: the queue is full, or a limit of the request's tenant is reached.
  // - DEADLINE_EXCEEDED: the deadline is out of reach.
  // - ALREADY_EXISTS: a request has this id whose caller cannot know yet that it is over.
  // - UNAVAILABLE: the scheduler is closed.
  Admission Submit(std::shared_ptr<PrefillJob> job);
  // Tells whether a job was admitted and is not retired.
  bool Knows(const PrefillJob& job) const {
    absl::MutexLock lock(&mu_);
    return live_.contains(&job);
  }
  // Takes in another receiver, which has joined a job that was admitted.
  void Adopt(std::shared_ptr<PrefillJob> receiver) {
    {
      absl::MutexLock lock(&mu_);
      by_id_[receiver->work().name()] = receiver;
      live_[receiver.get()] = std::move(receiver);
    }
    AdmitReceivers();
  }
  // Lets the passes see which receivers have come, and whom nobody awaits any longer. Must be
  // called every few milliseconds.
  void AdmitReceivers() {
    resources_.packer.AdmitReceivers();
    absl::MutexLock lock(&mu_);
    if (std::exchange(receivers_are_awaited_, false)) wake_.Notify();
  }
  // Makes the compute thread look for something to do, when a receiver has ended.
  void Wake() { wake_.Notify(); }
  // Ends the life of a job whose call is over. The job leaves the queue if it is still there.
  // Returns whether it was alive.
  bool Retire(PrefillJob& job);

  // Computes one step of one pass, or starts a pass. Returns false when nothing can be computed
  // before `wake` is notified. Only the compute thread may call it.
  bool StepOnce() { return TakeTurn(/*interrupted=*/nullptr); }

  // Returns a request, or a further receiver of one; null: there is none that is live.
  std::shared_ptr<PrefillJob> Find(const std::string& id, uint32_t receiver = 0) const;
  std::vector<LiveJob> LiveJobs() const;
  QueueState state() const;
  model::PrefixCacheUse prefix_cache() const;

  // Closes the scheduler: from now on Submit answers UNAVAILABLE with this reason.
  void Close(const std::string& reason) {
    absl::MutexLock lock(&mu_);
    if (closed_.empty()) closed_ = reason;
  }
  // Returns the reason; empty: the scheduler is open.
  std::string closed() const {
    absl::MutexLock lock(&mu_);
    return closed_;
  }
  void AbortAll(Outcome outcome, const absl::Status& status) {
    for (const LiveJob& live : LiveJobs()) live.job->Abort(outcome, status);
  }
  // Waits until no job is live. Returns false when the time ran out.
  bool AwaitIdle(absl::Duration timeout) {
    absl::MutexLock lock(&mu_);
    const auto idle = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
      return live_.empty() && running_.empty();
    };
    return mu_.AwaitWithTimeout(absl::Condition(&idle), timeout);
  }

  // Returns an error once the device has failed. Every request has been ended with UNAVAILABLE
  // then.
  absl::Status failure() const {
    absl::MutexLock lock(&mu_);
    return failure_;
  }

 private:
  using Jobs = std::vector<std::shared_ptr<PrefillJob>>;
  using Queue = std::deque<std::shared_ptr<PrefillJob>>;
  struct Running {
    std::unique_ptr<PrefillPass> pass;
    absl::Time last_step_at;
    bool is_stepping = false;  // it is the one that is interrupted, or one around that
  };
  struct RunningJob {
    std::shared_ptr<PrefillJob> job;
    int64_t pass = 0;  // its number
  };

  WaitingPrompt Describe(const PrefillJob& job) const;
  int64_t BatchTokens(const PrefillJob& job) const;  // 0: it has a pass of its own
  WaitingLine Line() const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  int64_t RequestsOf(int tenant) const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  int64_t NumRunning() const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  bool MateGoesOn(const PrefillJob& job) const ABSL_SHARED_LOCKS_REQUIRED(mu_);

  bool TakeTurn(const Running* interrupted);
  std::shared_ptr<PrefillJob> BestWaiting(bool must_interject, Contender* best);
  void NoteClaimants();
  bool PassAwaitsReceivers() const;  // one of those under way does
  // Jobs that the compute thread sees under the lock are of tenants whose weights it has then.
  void TakeOverWeights() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (std::exchange(weights_changed_, false)) standings_.shares().SetTenants(limits_.tenants);
  }
  Queue::const_iterator FindQueued(const PrefillJob& job) const ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return std::find_if(queue_.begin(), queue_.end(),
                        [&job](const auto& entry) { return entry.get() == &job; });
  }
  Jobs TakeJobs(const PrefillJob& head);
  void StartPass(Jobs jobs);
  void PutBack(Jobs jobs);
  PrefillPass::Next StepPass(Running& running, bool may_compute);
  void SetComputing(bool computing) {
    absl::MutexLock lock(&mu_);
    computing_ = computing;
  }
  void RecordSpeed(const PrefillPass& pass, absl::Duration compute);
  void EndPass(std::list<Running>::iterator running);
  void Forget(const Jobs& jobs);
  void Fail(const absl::Status& cause);

  model::PrefillEngine& engine_;
  const PassResources resources_;
  EventCount& wake_;

  mutable absl::Mutex mu_;
  QueueLimits limits_ ABSL_GUARDED_BY(mu_);
  bool weights_changed_ ABSL_GUARDED_BY(mu_) = false;  // since the compute thread took them over
  std::string closed_ ABSL_GUARDED_BY(mu_);            // reason; empty: open
  absl::Status failure_ ABSL_GUARDED_BY(mu_);
  Queue queue_ ABSL_GUARDED_BY(mu_);
  int64_t queued_tokens_ ABSL_GUARDED_BY(mu_) = 0;
  bool receivers_are_awaited_ ABSL_GUARDED_BY(mu_) = false;  // by a job that waits for that
  bool place_is_wanted_ ABSL_GUARDED_BY(mu_) = false;  // a queued prompt found none in the engine
  std::vector<RunningJob> running_ ABSL_GUARDED_BY(mu_);  // of all passes
  absl::flat_hash_map<const PrefillJob*, std::shared_ptr<PrefillJob>> live_ ABSL_GUARDED_BY(mu_);
  // The latest request of each id, and receiver of each name. It may have ended.
  absl::flat_hash_map<std::string, std::shared_ptr<PrefillJob>> by_id_ ABSL_GUARDED_BY(mu_);
  bool computing_ ABSL_GUARDED_BY(mu_) = false;
  PromptSpeed speed_ ABSL_GUARDED_BY(mu_);
  std::vector<TokenBucket> buckets_ ABSL_GUARDED_BY(mu_);  // [tenants]

  // Only the compute thread uses the members from here on.
  std::list<Running> passes_;
  int64_t passes_started_ = 0;
  Standings standings_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_SCHEDULER_H_
