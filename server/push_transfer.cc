#include "server/push_transfer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/process/log.h"
#include "proto/status_macros.h"
#include "proto/wire/channel.h"
#include "proto/wire/grpc_status.h"
#include "proto/wire/request_id.h"
#include "server/request_log.h"
#include "server/resumption_metrics.h"

namespace prefilld::server {

namespace v1 = ::prefill::v1;

PushTransfer::PushTransfer(std::shared_ptr<PrefillJob> job, PushDialer& dialer,
                           std::function<void()> on_done)
    : job_(std::move(job)),
      dialer_(dialer),
      open_(dialer.open_),
      on_done_(std::move(on_done)),
      span_(job_->work().caller.trace.Child()),
      may_resume_(job_->work().resume_window > absl::ZeroDuration()),
      lanes_(static_cast<size_t>(job_->work().num_lanes)) {}

void PushTransfer::Start() {
  Enter(1);
  Call(/*lane=*/0);
}

void PushTransfer::Enter(int64_t lanes) {
  open_lanes_ += lanes;
  absl::MutexLock lock(&open_->mu);
  open_->lanes += lanes;
}

// The last lane may be the last to own this.
void PushTransfer::Leave() {
  if (--open_lanes_ == 0) {
    Conclude(job_->ended() ? job_->ending().status : absl::OkStatus());
    if (on_done_ != nullptr) on_done_();
  }
  absl::MutexLock lock(&open_->mu);
  --open_->lanes;
}

void PushTransfer::Call(uint32_t lane, PushStream::Method method) {
  const PrefillWork& work = job_->work();
  PushStream::Call call;
  call.method = method;
  call.metadata = span_.Metadata();
  call.open.set_transfer_id(work.deliver_to.transfer_id());
  *call.open.mutable_layout() = work.layout;
  if (method == PushStream::Method::kReceiveLane) {
    call.open.set_lane(lane);
    call.open.set_num_lanes(static_cast<uint32_t>(lanes_.size()));
    call.open.set_transfer_key(work.transfer_key);
  }
  call.channel =
      wire::OpenPushChannel(work.deliver_to.address(), dialer_.credentials_,
                            {.use_proxy = dialer_.use_proxy_, .patience = dialer_.patience_});
  const absl::Duration time_left = work.deadline - dialer_.clock_.Now();
  call.deadline =
      time_left == absl::InfiniteDuration() ? absl::InfiniteFuture() : absl::Now() + time_left;
  call.open_streams = [open = open_.get()] {
    absl::MutexLock lock(&open->mu);
    return open->lanes;
  };
  PushStream::Start(
      *job_->delivery().side_lane(lane), std::move(call),
      {.on_receipt = [self = shared_from_this(), lane](
                         const v1::ReceiveReceipt& receipt,
                         bool first) { return self->OnReceipt(lane, receipt, first); },
       .on_done =
           [self = shared_from_this(), lane, method](const absl::Status& status,
                                                     std::optional<v1::ReceiveResponse> answer) {
             method == PushStream::Method::kReceive ? self->OnPlainCallDone(status, answer)
                                                    : self->OnCallDone(lane, status);
           }});
}

absl::Status PushTransfer::OnReceipt(uint32_t lane, const v1::ReceiveReceipt& receipt, bool first) {
  const auto again = job_->delivery().AcknowledgePush(lane, receipt, /*goes_on=*/first);
  if (absl::IsAborted(again.status())) job_->Abort(Outcome::kDamaged, again.status());
  PREFILLD_RETURN_IF_ERROR(again.status());
  lanes_[lane].received = std::max(lanes_[lane].received, receipt.received());
  if (first) OnFirstReceipt(lane, *again);
  if (!first && *again > 0) dialer_.metrics_.CountDamaged(*again);
  if (!receipt.complete()) return absl::OkStatus();
  if (lane > 0 || !job_->delivery().result_was_pushed()) {
    return absl::DataLossError("a receipt says complete, and the result was not sent");
  }
  Succeed();
  return absl::OkStatus();
}

void PushTransfer::OnFirstReceipt(uint32_t lane, int64_t frames_again) {
  lanes_[lane].patience.OnHeard(dialer_.clock_.Now());
  if (std::exchange(lanes_[lane].was_heard, true)) {
    dialer_.metrics_.CountResumed(frames_again);
    process::LogEvent(process::LogLevel::kInfo, "stream_resumed",
                      {{"id", wire::ShownId(job_->work().id)},
                       {"receiver", int64_t{job_->work().receiver}},
                       {"lane", int64_t{lane}},
                       {"deliver_to", job_->work().deliver_to.address()},
                       {"received", static_cast<int64_t>(lanes_[lane].received)},
                       {"frames_again", frames_again},
                       {"trace_id", job_->work().caller.trace.trace_id}});
  } else if (lane == 0) {
    is_accepted_.store(true);
    Enter(static_cast<int64_t>(lanes_.size()) - 1);
    for (uint32_t other = 1; other < lanes_.size(); ++other) Call(other);
  }
}

void PushTransfer::OnCallDone(uint32_t lane, absl::Status status) {
  if (is_concluded_.load() || job_->ended()) return Leave();
  if (lane == 0 && !lanes_[0].was_heard && absl::IsUnimplemented(status)) return FallBack();
  // A receiver that has everything may end the calls of the other lanes.
  if (lane > 0 && status.ok() && job_->delivery().result_was_pushed()) return Leave();
  if (status.ok()) status = absl::DataLossError("ended before the last frame");
  absl::Status reason = status;
  if (may_resume_ && CallAgain(lane, status, reason)) return;
  Fail(reason);
  Leave();
}

// The receiver knows no ReceiveLane.
void PushTransfer::FallBack() {
  dialer_.metrics_.CountPlainPush();
  process::LogEvent(process::LogLevel::kWarning, "plain_push",
                    {{"id", wire::ShownId(job_->work().id)},
                     {"receiver", int64_t{job_->work().receiver}},
                     {"deliver_to", job_->work().deliver_to.address()},
                     {"reason", "the receiver knows no ReceiveLane"},
                     {"lanes", int64_t{1}},
                     {"resumable", "no"}});
  job_->delivery().FallBackToPlainPush();
  Call(/*lane=*/0, PushStream::Method::kReceive);
}

void PushTransfer::OnPlainCallDone(const absl::Status& status,
                                   const std::optional<v1::ReceiveResponse>& answer) {
  const auto sent_bytes = static_cast<uint64_t>(job_->delivery().sent().bytes);
  if (!status.ok()) {
    Fail(status);
  } else if (!answer.has_value()) {
    Fail(absl::DataLossError("ended before the last frame"));
  } else if (answer->kv_bytes() != sent_bytes) {
    Fail(absl::DataLossError(
        absl::StrCat("stored ", answer->kv_bytes(), " bytes of KV; ", sent_bytes, " were sent")));
  } else {
    Succeed();
  }
  Leave();
}

// Returns false, and the reason, when the lane is not called again.
bool PushTransfer::CallAgain(uint32_t lane, const absl::Status& broken, absl::Status& reason) {
  Lane& state = lanes_[lane];
  // The receiver has ended, or is not the one that it was. If it had just said why it ended, that
  // is the reason, and not that it knows nothing more of the transfer.
  if (absl::IsNotFound(broken) || absl::IsCancelled(broken)) {
    const absl::Status& before = state.patience.reason();
    const bool has_said_why = absl::IsDataLoss(before) || absl::IsInternal(before);
    if (absl::IsNotFound(broken) && !state.patience.is_heard() && has_said_why) reason = before;
    return false;
  }
  const auto next = state.patience.OnBroken(broken,
                                            {.accepted = is_accepted_.load(),
                                             .window = job_->work().resume_window,
                                             .progress = state.received},
                                            dialer_.clock_.Now());
  if (next != wire::LanePatience::Next::kResume) {
    reason = state.patience.reason();
    return false;
  }
  // A new one for each pause, because the one before may still be going off. It keeps its function
  // afterwards, and this keeps it, so the function lets go of this.
  state.pause = std::make_unique<grpc::Alarm>();
  state.pause->Set(absl::ToChronoTime(absl::Now() + state.patience.pause()),
                   [owner = shared_from_this(), lane](bool) mutable {
                     const std::shared_ptr<PushTransfer> self = std::move(owner);
                     if (self->is_concluded_.load() || self->job_->ended()) return self->Leave();
                     self->Call(lane);
                   });
  return true;
}

void PushTransfer::Succeed() {
  if (!Conclude(absl::OkStatus())) return;
  job_->delivery().OnSideLaneDone(/*lane=*/0);
  if (job_->work().receiver > 0) job_->OnResultSent();
}

void PushTransfer::Fail(const absl::Status& status) {
  const absl::Status failure = wire::WithPrefix(
      absl::StrCat("deliver_to ", job_->work().deliver_to.address(), ": "), status);
  Conclude(status);
  if (absl::IsDeadlineExceeded(status) && job_->deadline_has_passed()) {
    return job_->OnCallCancelled();  // it is the request's own, and no fault of the receiver
  }
  job_->Abort(Outcome::kReceiverFailed, failure);
}

// Returns whether this is the end. It is logged before the caller can know it.
bool PushTransfer::Conclude(const absl::Status& status) {
  if (is_concluded_.exchange(true)) return false;
  LogPush(job_->work(), span_, absl::Now() - started_at_, job_->delivery().sent().bytes, status);
  return true;
}

}  // namespace prefilld::server
