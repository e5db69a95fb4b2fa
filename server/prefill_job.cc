#include "server/prefill_job.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;

constexpr absl::Duration kClockSlack = absl::Milliseconds(50);

}  // namespace

PrefillJob::PrefillJob(PrefillWork work, const Clock& clock, Dial dial)
    : work_(std::move(work)),
      clock_(clock),
      dial_(std::move(dial)),
      accepted_at_(clock.Now()),
      record_(accepted_at_),
      delivery_(work_.num_lanes, work_.pushes(), clock),
      last_event_at_(accepted_at_) {}

v1::PrefillEvent AcceptedEvent(const PrefillWork& work, int64_t queue_position) {
  v1::PrefillEvent event;
  event.mutable_accepted()->set_request_id(work.id);
  *event.mutable_accepted()->mutable_layout() = work.layout;
  event.mutable_accepted()->set_num_lanes(work.num_lanes);
  event.mutable_accepted()->set_queue_position(queue_position);
  event.mutable_accepted()->set_lane_key(work.lane_key);
  event.mutable_accepted()->set_priority(work.priority);
  return event;
}

void PrefillJob::Start(model::AttentionPolicy policy, int batch_prompts, int64_t cached_tokens) {
  const absl::Time now = clock_.Now();
  record_.Start(now, policy, batch_prompts, cached_tokens);
  delivery_.progress().started_at = now;
  if (work_.pushes()) dial_(shared_from_this());
}

void PrefillJob::RecordLayer(const model::LayerReport& report) {
  record_.AddLayer(report);
  delivery_.progress().layers_computed.fetch_add(1, std::memory_order_relaxed);
  SendProgress(0);
}

void PrefillJob::SendProgress(int64_t queue_position) {
  const absl::Time now = clock_.Now();
  {
    absl::MutexLock lock(&mu_);
    last_event_at_ = now;
  }
  v1::PrefillEvent event;
  v1::Progress& progress = *event.mutable_progress();
  progress.set_layers_computed(record_.stats().layers_computed);
  progress.set_num_layers(work_.layout.num_layers());
  progress.set_elapsed_us(absl::ToInt64Microseconds(now - accepted_at_));
  progress.set_queue_position(queue_position);
  delivery_.Send(std::move(event));
}

void PrefillJob::Finish() {
  v1::PrefillResult result = record_.TakeResult(work_.layer_stats);
  result.set_num_tokens(work_.tokens.size());
  delivery_.SendResult(std::move(result));
}

void PrefillJob::Abort(Outcome outcome, const absl::Status& status) {
  {
    absl::MutexLock lock(&mu_);
    if (ended_.exchange(true, std::memory_order_acq_rel)) return;
    ending_ = {outcome, status};
  }
  delivery_.Abort(status);
}

void PrefillJob::OnCallCancelled() {
  // gRPC cancels at the deadline too, but by its own clock.
  if (clock_.Now() + kClockSlack >= work_.deadline) {
    Abort(Outcome::kDeadline, DeadlinePassed());
  } else {
    Abort(Outcome::kCancelled, absl::CancelledError(absl::StrCat("cancelled ", Whereabouts())));
  }
}

bool PrefillJob::id_is_free() const { return ended() || delivery_.result_is_out(); }

void PrefillJob::OnResultSent() { ended_.store(true, std::memory_order_release); }

absl::Status PrefillJob::DeadlinePassed() const {
  return absl::DeadlineExceededError(absl::StrCat("the deadline passed ", Whereabouts()));
}

absl::Status PrefillJob::CheckConsumerSpeed(const JobTimeouts& timeouts,
                                            const LaneQueue::Taken& taken) const {
  const double min_speed = timeouts.min_consumer_bytes_per_s;
  if (min_speed <= 0) return absl::OkStatus();
  const auto bytes = static_cast<double>(taken.payload_bytes);
  if (taken.busy <= timeouts.stall + absl::Seconds(bytes / min_speed)) return absl::OkStatus();
  return absl::AbortedError(
      absl::StrCat("the consumer took ", bytes * 1e-6, " MB in ", absl::FormatDuration(taken.busy),
                   " and others wait; at least ", min_speed * 1e-6, " MB/s after ",
                   absl::FormatDuration(timeouts.stall), ", ", Whereabouts()));
}

void PrefillJob::CheckTimers(const JobTimeouts& timeouts, int64_t queue_position,
                             bool others_wait) {
  if (ended()) return;
  const absl::Time now = clock_.Now();
  absl::Time last_event_at;
  {
    absl::MutexLock lock(&mu_);
    last_event_at = last_event_at_;
  }
  const Delivery::ConsumerState consumer = delivery_.consumer(now);
  if (now >= work_.deadline) {
    Abort(Outcome::kDeadline, DeadlinePassed());
  } else if (consumer.stalled > timeouts.stall) {
    Abort(Outcome::kStalled, absl::AbortedError(absl::StrCat("the consumer took nothing for ",
                                                             absl::FormatDuration(timeouts.stall),
                                                             ", ", Whereabouts())));
  } else if (!work_.pushes() && !consumer.all_attached &&
             now - accepted_at_ > timeouts.lane_attach) {
    Abort(Outcome::kLanesMissing,
          absl::AbortedError(absl::StrCat("not all of ", work_.num_lanes,
                                          " lanes were attached within ",
                                          absl::FormatDuration(timeouts.lane_attach))));
  } else if (const absl::Status speed =
                 others_wait ? CheckConsumerSpeed(timeouts, consumer.kv_taken) : absl::OkStatus();
             !speed.ok()) {
    Abort(Outcome::kTooSlow, speed);
  } else if (now - last_event_at > timeouts.heartbeat && consumer.control_idle) {
    SendProgress(queue_position);
  }
}

std::string PrefillJob::Whereabouts() const {
  const RequestStats stats = record_.stats();
  if (!stats.started_at.has_value()) return "before the first layer";
  return absl::StrCat("after layer ", stats.layers_computed, " of ", work_.layout.num_layers());
}

Ending PrefillJob::ending() const {
  absl::MutexLock lock(&mu_);
  return ending_;
}

}  // namespace prefilld::server
