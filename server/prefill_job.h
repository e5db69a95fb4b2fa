// One admitted request on its way through the house: the object that carries its state along.
#ifndef PREFILLD_SERVER_PREFILL_JOB_H_
#define PREFILLD_SERVER_PREFILL_JOB_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "prefill/v1/prefill.pb.h"
#include "server/clock.h"
#include "server/delivery.h"
#include "server/outcome.h"
#include "server/prefill_work.h"
#include "server/staging_ring.h"

namespace prefilld::server {

// Time limits that hold for every request.
struct JobTimeouts {
  absl::Duration stall = absl::Seconds(30);
  absl::Duration lane_attach = absl::Seconds(10);
  absl::Duration heartbeat = absl::Seconds(5);  // greatest silence of the control stream
  // A consumer that others wait for takes at least so much, `stall` for its start apart. 0: any.
  double min_consumer_bytes_per_s = 0;
};

// What has been measured of a request.
struct JobStats {
  absl::Time accepted_at = absl::InfinitePast();
  std::optional<absl::Time> started_at;          // first layer
  std::optional<absl::Time> first_token_at;      // sampled
  std::optional<model::AttentionPolicy> policy;  // the one that ran
  int batch_prompts = 0;                         // computed together, this one included
  std::vector<model::LayerReport> layers;        // computed so far
  absl::Duration stalled;                        // layers waited for the consumers
  std::optional<absl::Duration> logprobs;        // of the prompt took, if asked for
};

// A request ends once: by Abort, whoever finds a reason first, or with its result sent.
// Thread-safe.
class PrefillJob {
 public:
  PrefillJob(PrefillWork work, const Clock& clock);

  const PrefillWork& work() const { return work_; }
  Delivery& delivery() { return delivery_; }
  const std::shared_ptr<StagingRing::Credit>& credit() const { return credit_; }

  // Connects a push; called by Start. Set before the job is submitted.
  void set_start_delivery(absl::AnyInvocable<void()> start) { start_delivery_ = std::move(start); }

  // The way through, in this order, from Start on by the compute thread. Finish, after the last
  // frame, sends the result.
  void Accept(int64_t queue_position);
  void Start(model::AttentionPolicy policy, int batch_prompts);
  void RecordLayer(const model::LayerReport& report);
  void RecordStall(absl::Duration stalled);
  void RecordFirstToken(model::SampledToken token);
  void RecordLogprobs(model::PromptLogprobs logprobs, absl::Duration took);  // if asked for
  void Finish();

  // Ends the request unless it has ended: every stream ends with `status`, buffers come back.
  void Abort(Outcome outcome, const absl::Status& status);
  // The caller cancelled, or is gone, or its deadline passed.
  void OnCallCancelled();
  // The result and an OK status went out.
  void OnResultSent();
  bool ended() const { return ended_.load(std::memory_order_acquire); }

  // Aborts for a passed deadline, missing lanes, a consumer that stands still, or one that is slow
  // while others wait; breaks a long silence.
  void CheckTimers(const JobTimeouts& timeouts, int64_t queue_position, bool others_wait);

  Outcome outcome() const;           // after ended()
  absl::Status status() const;       // after ended()
  JobStats stats() const;            // a snapshot
  absl::Duration age() const;        // since it was accepted
  absl::Duration time_left() const;  // to the deadline

 private:
  void SendProgress(int64_t queue_position);
  absl::Status CheckConsumerSpeed(const JobTimeouts& timeouts, absl::Time now) const;
  std::string Whereabouts() const;

  const PrefillWork work_;
  const Clock& clock_;
  const std::shared_ptr<StagingRing::Credit> credit_ = std::make_shared<StagingRing::Credit>();
  absl::AnyInvocable<void()> start_delivery_;

  Delivery delivery_;
  std::atomic<bool> ended_ = false;

  mutable absl::Mutex mu_;
  JobStats stats_ ABSL_GUARDED_BY(mu_);
  model::SampledToken first_token_ ABSL_GUARDED_BY(mu_);
  model::PromptLogprobs logprobs_ ABSL_GUARDED_BY(mu_);
  absl::Time last_event_at_ ABSL_GUARDED_BY(mu_);
  Outcome outcome_ ABSL_GUARDED_BY(mu_) = Outcome::kOk;
  absl::Status status_ ABSL_GUARDED_BY(mu_);
};

// Sums over the layers; density is their mean by queries.
::prefill::v1::LayerStats SumOf(const std::vector<model::LayerReport>& layers);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_PREFILL_JOB_H_
