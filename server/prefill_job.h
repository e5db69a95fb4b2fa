// One admitted request on its way through the server, as the object that carries its state.
#ifndef PREFILLD_SERVER_PREFILL_JOB_H_
#define PREFILLD_SERVER_PREFILL_JOB_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/clock.h"
#include "server/delivery.h"
#include "server/other_receivers.h"
#include "server/outcome.h"
#include "server/prefill_work.h"
#include "server/request_record.h"
#include "server/staging_ring.h"

namespace prefilld::server {

// Time limits that hold for every request.
struct JobTimeouts {
  absl::Duration stall = absl::Seconds(30);
  absl::Duration lane_attach = absl::Seconds(10);
  absl::Duration receiver_attach = absl::Seconds(10);  // other receivers are awaited for so long
  absl::Duration heartbeat = absl::Seconds(5);         // greatest silence of the control stream
  // A consumer that others wait for must take at least this much, once it has had `stall` to
  // start. 0: a consumer may be as slow as it likes.
  double min_consumer_bytes_per_s = 0;
};

// The way in which a request ended.
struct Ending {
  Outcome outcome = Outcome::kOk;
  absl::Status status;
};

// A request ends once: by Abort, from whichever thread finds a reason first, or with its result
// sent. Its streams, the queue and the pass that computes it own it together, by shared_ptr.
// Thread-safe.
//
// Where a request has several receivers, each is such a job: that of the first call is computed,
// and the others Join it, get told what it computes, and receive their KV. Each ends alone, but
// when the first call is cancelled, passes its deadline or fails, or ends before it is computed,
// all end.
//
// It has many methods because all of them meet here: the scheduler reads the work and its age, the
// pass reports what it computes, the streams tell how the call ends, and the watchdog checks
// timers.
class PrefillJob : public std::enable_shared_from_this<PrefillJob> {
 public:
  // Opens the call to the receiver of a push.
  using Dial = std::function<void(std::shared_ptr<PrefillJob>)>;

  // `dial` is called by Start when the work is a push, and may be null when it is not.
  PrefillJob(PrefillWork work, const Clock& clock, Dial dial = nullptr);

  const PrefillWork& work() const { return work_; }
  absl::Time accepted_at() const { return accepted_at_; }
  Delivery& delivery() { return delivery_; }
  // The tokens that the prefix cache held when the request came. The scheduler sets them before
  // another thread sees the job.
  void set_expected_cached_tokens(int64_t tokens) { expected_cached_tokens_ = tokens; }
  int64_t expected_cached_tokens() const { return expected_cached_tokens_; }
  // Counts the staging buffers that its frames hold.
  const std::shared_ptr<StagingRing::Credit>& credit() const { return credit_; }
  // ClaimSharedMemory notes that a consumer attaches shared memory, and returns false if it was
  // noted before. Unclaim takes that back, if the memory is refused.
  bool ClaimSharedMemory() { return !has_shared_memory_.exchange(true); }
  void UnclaimSharedMemory() { has_shared_memory_.store(false); }
  // Returns false if a refusal was noted before.
  bool NoteSharedMemoryRefused() { return !was_refused_memory_.exchange(true); }
  RequestRecord& record() { return record_; }
  const RequestRecord& record() const { return record_; }

  // The compute thread calls these in this order: Start before the first layer, RecordLayer after
  // each layer, and Finish, which sends the result, after the last frame. Start and RecordLayer
  // tell the other receivers too; Finish is called for each receiver when its own last frame has
  // left.
  void Start(model::AttentionPolicy policy, int batch_prompts, int64_t cached_tokens);
  void RecordLayer(const model::LayerReport& report);
  void Finish(PrefillJob& receiver);  // itself, or one of others()
  bool finished() const { return finished_; }

  // Takes in another receiver of what this request computes and sends it Accepted. Errors:
  // - PERMISSION_DENIED: it does not show the key.
  // - INVALID_ARGUMENT: its prompt has another length.
  // - those of OtherReceivers::Add.
  //
  // A receiver that is pushed to joins before its request is admitted, and its call is opened by
  // Start.
  absl::Status Join(const std::shared_ptr<PrefillJob>& receiver);
  OtherReceivers::Present others() const { return others_.present(); }
  // Tells whether somebody still takes what is computed: this call, or another receiver.
  bool wanted() const;

  // Ends the request unless it has ended: every stream ends with `status` and the buffers come
  // back.
  void Abort(Outcome outcome, const absl::Status& status);
  // Ends the request, unless it has ended, because its caller cancelled, its connection died or its
  // deadline passed.
  void OnCallCancelled();
  bool deadline_has_passed() const;
  // Ends the request well: its result and an OK status went out.
  void OnResultSent();
  // Ends a resumable request well, because its consumer has the result. FAILED_PRECONDITION: the
  // result was not sent yet.
  absl::Status Complete();
  // Ends a resumable request whose consumer is away. It has ended well if nothing but the result
  // was left to be said, with `outcome` otherwise.
  void GiveUpConsumer(const absl::Status& reason, Outcome outcome = Outcome::kNotResumed);
  bool ended() const { return ended_.load(std::memory_order_acquire); }
  Ending ending() const;  // valid after ended()
  // Tells whether another request may have this one's id. It is true before the caller can know
  // that the request is over. The id of a further receiver is its request's, not its own.
  bool id_is_free() const;
  // Tells whether the request was admitted as a resumable one. Then ResumableJobs ends its life,
  // and the end of its call means nothing.
  bool outlives_call() const { return outlives_call_.load(std::memory_order_acquire); }
  void set_outlives_call() { outlives_call_.store(true, std::memory_order_release); }

  // Aborts the request if its deadline has passed, lanes are missing, its consumer takes nothing,
  // or its consumer is slow while others wait. Sends progress when the control stream has been
  // silent for long.
  void CheckTimers(const JobTimeouts& timeouts, int64_t queue_position, bool others_wait);

 private:
  void SendProgress(int64_t queue_position);
  void Follow(const PrefillJob& first);
  void AbortOthers(Outcome outcome, const absl::Status& status);
  bool FellowGoesOn() const;
  void AddPushResults(::prefill::v1::PrefillResult& result) const;
  absl::Status FailureOfAllPushes() const;
  absl::Status CheckConsumerSpeed(const JobTimeouts& timeouts, const LaneQueue::Taken& taken) const;
  absl::Status DeadlinePassed() const;
  std::string Whereabouts() const;

  const PrefillWork work_;
  const Clock& clock_;
  const Dial dial_;
  absl::Time accepted_at_;  // of a further receiver: set by Join, before other threads see it
  int64_t expected_cached_tokens_ = 0;
  bool finished_ = false;  // belongs to the compute thread

  // Co-owned by the buffers on loan.
  const std::shared_ptr<StagingRing::Credit> credit_ = std::make_shared<StagingRing::Credit>();
  std::atomic<bool> was_refused_memory_ = false;
  std::atomic<bool> has_shared_memory_ = false;
  RequestRecord record_;
  Delivery delivery_;
  std::atomic<bool> ended_ = false;
  std::atomic<bool> outlives_call_ = false;

  // Held while the state of the computation passes to others_, or a receiver joins them with it. It
  // is outside all other locks of jobs.
  absl::Mutex followed_mu_;
  OtherReceivers others_;
  std::weak_ptr<const PrefillJob> first_;  // of a further receiver: the one that it has joined

  mutable absl::Mutex mu_;
  absl::Time last_event_at_ ABSL_GUARDED_BY(mu_);
  Ending ending_ ABSL_GUARDED_BY(mu_);
};

// Makes the first event of a request.
::prefill::v1::PrefillEvent AcceptedEvent(const PrefillWork& work, int64_t queue_position);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_PREFILL_JOB_H_
