#include "server/prefill_job.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;

constexpr absl::Duration kClockSlack = absl::Milliseconds(50);

// Tells whether the first call's end is one as a receiver, which leaves the others alone.
bool EndsAlone(Outcome outcome) {
  return outcome == Outcome::kStalled || outcome == Outcome::kTooSlow ||
         outcome == Outcome::kLanesMissing || outcome == Outcome::kNotResumed ||
         outcome == Outcome::kDamaged;
}

}  // namespace

PrefillJob::PrefillJob(PrefillWork work, const Clock& clock, Dial dial)
    : work_(std::move(work)),
      clock_(clock),
      dial_(std::move(dial)),
      accepted_at_(clock.Now()),
      record_(accepted_at_),
      delivery_(work_.num_lanes, work_.pushes(), clock, work_.resumable()),
      others_(work_.num_receivers - 1),
      last_event_at_(accepted_at_) {}

v1::PrefillEvent AcceptedEvent(const PrefillWork& work, int64_t queue_position) {
  v1::PrefillEvent event;
  event.mutable_accepted()->set_request_id(work.id);
  *event.mutable_accepted()->mutable_layout() = work.layout;
  event.mutable_accepted()->set_num_lanes(work.pushes() ? 1 : work.num_lanes);
  event.mutable_accepted()->set_queue_position(queue_position);
  event.mutable_accepted()->set_lane_key(work.lane_key);
  event.mutable_accepted()->set_priority(work.priority);
  if (work.receiver == 0 && work.takes_kv)
    event.mutable_accepted()->set_receiver_key(work.receiver_key);
  event.mutable_accepted()->set_receiver(static_cast<uint32_t>(work.receiver));
  if (work.resumable()) {
    event.mutable_accepted()->set_resume_window_ms(
        static_cast<uint32_t>(absl::ToInt64Milliseconds(work.resume_window)));
  }
  if (!work.shared_memory.key().empty()) {
    *event.mutable_accepted()->mutable_shared_memory() = work.shared_memory;
  }
  return event;
}

void PrefillJob::Start(model::AttentionPolicy policy, int batch_prompts, int64_t cached_tokens) {
  const absl::Time now = clock_.Now();
  OtherReceivers::Present others;
  {
    absl::MutexLock lock(&followed_mu_);
    record_.Start(now, policy, batch_prompts, cached_tokens);
    delivery_.progress().started_at = now;
    others = others_.present();
    for (const auto& receiver : others.jobs) receiver->Follow(*this);
  }
  if (work_.pushes()) dial_(shared_from_this());
  for (const auto& receiver : others.jobs) {
    if (receiver->work_.pushes() && !receiver->ended()) receiver->dial_(receiver);
  }
}

void PrefillJob::RecordLayer(const model::LayerReport& report) {
  OtherReceivers::Present others;
  {
    absl::MutexLock lock(&followed_mu_);
    record_.AddLayer(report);
    delivery_.progress().layers_computed.fetch_add(1, std::memory_order_relaxed);
    others = others_.present();
    for (const auto& receiver : others.jobs) receiver->Follow(*this);
  }
  SendProgress(0);
  for (const auto& receiver : others.jobs) receiver->SendProgress(0);
}

// Brings a receiver to the state of the computation. The first call's followed_mu_ is held.
void PrefillJob::Follow(const PrefillJob& first) {
  record_.Follow(first.record_);
  const ComputeProgress& progress = first.delivery_.progress();
  // It is written once, before the first frame, because frames are stamped without a lock.
  if (delivery_.progress().started_at == absl::InfinitePast()) {
    delivery_.progress().started_at = progress.started_at;
  }
  delivery_.progress().layers_computed.store(
      progress.layers_computed.load(std::memory_order_relaxed), std::memory_order_relaxed);
}

absl::Status PrefillJob::Join(const std::shared_ptr<PrefillJob>& receiver) {
  const PrefillWork& wanted = receiver->work_;
  if (work_.num_receivers < 2 || !IsSameKey(wanted.receiver_key, work_.receiver_key)) {
    return absl::PermissionDeniedError("receiver_key: not the one of this request");
  }
  if (wanted.layout.num_tokens() != work_.layout.num_tokens()) {
    return absl::InvalidArgumentError(absl::StrCat("num_tokens ", wanted.layout.num_tokens(),
                                                   "; the request's prompt has ",
                                                   work_.layout.num_tokens()));
  }
  receiver->accepted_at_ = clock_.Now();
  receiver->first_ = weak_from_this();
  {
    absl::MutexLock lock(&receiver->mu_);
    receiver->last_event_at_ = receiver->accepted_at_;
  }
  absl::MutexLock lock(&followed_mu_);
  receiver->Follow(*this);
  // Accepted goes first, because frames may come as soon as the receiver is among the others. A
  // receiver that is refused sends nothing of what it has been given.
  if (!wanted.pushes()) receiver->delivery_.Send(AcceptedEvent(wanted, /*queue_position=*/0));
  return others_.Add(receiver);
}

bool PrefillJob::wanted() const {
  if (!ended()) return true;
  const OtherReceivers::Present others = others_.present();
  return std::any_of(others.jobs.begin(), others.jobs.end(),
                     [](const auto& receiver) { return !receiver->ended(); });
}

// Tells whether another receiver of the same computation still receives.
bool PrefillJob::FellowGoesOn() const {
  const std::shared_ptr<const PrefillJob> joined = first_.lock();
  if (joined == nullptr && work_.num_receivers < 2) return false;
  const PrefillJob& first = joined == nullptr ? *this : *joined;
  const auto goes_on = [this](const PrefillJob& job) {
    return &job != this && job.work_.takes_kv && !job.ended() && !job.delivery_.result_is_out();
  };
  const OtherReceivers::Present others = first.others();
  return goes_on(first) || std::any_of(others.jobs.begin(), others.jobs.end(),
                                       [&](const auto& job) { return goes_on(*job); });
}

void PrefillJob::SendProgress(int64_t queue_position) {
  if (work_.receiver > 0 && work_.pushes()) return;  // nobody called
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

void PrefillJob::Finish(PrefillJob& receiver) {
  if (&receiver != this) {
    absl::MutexLock lock(&followed_mu_);
    receiver.Follow(*this);
  }
  receiver.finished_ = true;
  v1::PrefillResult result = receiver.record_.TakeResult(receiver.work_.layer_stats);
  result.set_num_tokens(work_.layout.num_tokens());
  if (!receiver.work_.takes_kv) AddPushResults(result);
  receiver.delivery_.SendResult(std::move(result));
}

void PrefillJob::AddPushResults(v1::PrefillResult& result) const {
  for (const auto& receiver : others_.present().jobs) {
    const Ending ending = receiver->ending();
    const Delivery::Sent sent = receiver->delivery_.sent();
    v1::PushResult& push = *result.add_pushes();
    push.set_code(static_cast<int>(ending.status.code()));
    push.set_message(std::string(ending.status.message()));
    push.set_kv_bytes(sent.bytes);
    push.set_kv_frames(
        std::accumulate(sent.frames_per_lane.begin(), sent.frames_per_lane.end(), int64_t{0}));
  }
}

absl::Status PrefillJob::FailureOfAllPushes() const {
  const OtherReceivers::Present others = others_.present();
  for (const auto& receiver : others.jobs) {
    if (!receiver->ended() || receiver->ending().outcome == Outcome::kOk) return absl::OkStatus();
  }
  return others.jobs.front()->ending().status;
}

void PrefillJob::Abort(Outcome outcome, const absl::Status& status) {
  {
    absl::MutexLock lock(&mu_);
    if (ended_.exchange(true, std::memory_order_acq_rel)) return;
    ending_ = {outcome, status};
  }
  delivery_.Abort(status);
  others_.Close();
  if (!EndsAlone(outcome) || !record_.stats().started_at.has_value()) AbortOthers(outcome, status);
}

// They get the reason of the first call, but have cancelled nothing themselves.
void PrefillJob::AbortOthers(Outcome outcome, const absl::Status& status) {
  const absl::Status reason(absl::IsCancelled(status) ? absl::StatusCode::kAborted : status.code(),
                            absl::StrCat("the request's first call has ended: ", status.message()));
  for (const auto& receiver : others_.present().jobs) receiver->Abort(outcome, reason);
}

void PrefillJob::OnCallCancelled() {
  if (deadline_has_passed()) {
    Abort(Outcome::kDeadline, DeadlinePassed());
  } else {
    Abort(Outcome::kCancelled, absl::CancelledError(absl::StrCat("cancelled ", Whereabouts())));
  }
}

// gRPC ends calls at the deadline by its own clock.
bool PrefillJob::deadline_has_passed() const {
  return clock_.Now() + kClockSlack >= work_.deadline;
}

bool PrefillJob::id_is_free() const {
  return work_.receiver > 0 || ended() || delivery_.result_is_out();
}

void PrefillJob::OnResultSent() { ended_.store(true, std::memory_order_release); }

absl::Status PrefillJob::Complete() {
  if (!delivery_.result_is_out()) {
    return absl::FailedPreconditionError("complete: the result was not sent yet");
  }
  OnResultSent();
  // A consumer that has everything has read its streams to their ends. One that only says so must
  // not keep the buffer of a write that it does not take.
  delivery_.Abort(absl::CancelledError("the consumer said that it has everything"));
  return absl::OkStatus();
}

void PrefillJob::GiveUpConsumer(const absl::Status& reason, Outcome outcome) {
  if (delivery_.result_is_out()) {
    OnResultSent();
    delivery_.Abort(reason);
  } else {
    Abort(outcome, reason);
  }
}

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
  if (now - accepted_at_ > timeouts.receiver_attach) others_.Close();
  const Delivery::ConsumerState consumer = delivery_.consumer(now);
  const absl::Status pushes = work_.takes_kv ? absl::OkStatus() : FailureOfAllPushes();
  if (now >= work_.deadline && consumer.away > absl::ZeroDuration()) {
    GiveUpConsumer(DeadlinePassed(), Outcome::kDeadline);
  } else if (now >= work_.deadline) {
    Abort(Outcome::kDeadline, DeadlinePassed());
  } else if (!pushes.ok()) {
    Abort(Outcome::kReceiverFailed, pushes);
  } else if (consumer.stalled > timeouts.stall) {
    Abort(Outcome::kStalled, absl::AbortedError(absl::StrCat("the consumer took nothing for ",
                                                             absl::FormatDuration(timeouts.stall),
                                                             ", ", Whereabouts())));
  } else if (consumer.away > work_.resume_window) {
    GiveUpConsumer(absl::AbortedError(
        absl::StrCat("the connection broke and nobody came back within ",
                     absl::FormatDuration(work_.resume_window), ", ", Whereabouts())));
  } else if (!work_.pushes() && !consumer.all_attached && consumer.away <= absl::ZeroDuration() &&
             now - accepted_at_ > timeouts.lane_attach) {
    Abort(Outcome::kLanesMissing,
          absl::AbortedError(absl::StrCat("not all of ", work_.num_lanes,
                                          " lanes were attached within ",
                                          absl::FormatDuration(timeouts.lane_attach))));
  } else if (const absl::Status speed = others_wait || FellowGoesOn()
                                            ? CheckConsumerSpeed(timeouts, consumer.kv_taken)
                                            : absl::OkStatus();
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
