#include "server/delivery.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace prefilld::server {

namespace v1 = ::prefill::v1;

Delivery::Delivery(int num_lanes, bool pushes, const Clock& clock, bool resumable)
    : pushes_(pushes),
      resumable_(resumable),
      control_(std::make_unique<LaneQueue>(clock, /*lane=*/0, progress_, resumable)) {
  if (!pushes) kv_lanes_.push_back(control_.get());
  while (kv_lanes_.size() < static_cast<size_t>(num_lanes)) {
    const auto lane = static_cast<uint32_t>(kv_lanes_.size());
    side_lanes_.push_back(std::make_unique<LaneQueue>(clock, lane, progress_, pushes || resumable));
    kv_lanes_.push_back(side_lanes_.back().get());
    if (!pushes || lane == 0) open_side_lanes_.push_back(lane);
  }
  if (pushes) KeepUntilAcknowledged();
  sent_.frames_per_lane.assign(kv_lanes_.size(), 0);
}

absl::StatusOr<LaneQueue*> Delivery::side_lane(uint32_t lane) {
  if (lane >= kv_lanes_.size() || kv_lanes_[lane] == control_.get()) {
    return absl::InvalidArgumentError(
        absl::StrCat("lane ", lane, "; lanes 1 to ", kv_lanes_.size() - 1, " can be attached"));
  }
  return kv_lanes_[lane];
}

absl::StatusOr<LaneQueue*> Delivery::any_lane(uint32_t lane) {
  if (lane == 0) return control_.get();
  if (!pushes_) return side_lane(lane);
  return absl::InvalidArgumentError(absl::StrCat("lane ", lane, "; the KV is pushed"));
}

void Delivery::Send(v1::PrefillEvent event) { control_->Push(std::move(event)); }

int Delivery::SendFrame(KvFrame frame) {
  int lane = 0;
  {
    absl::MutexLock lock(&mu_);
    lane = NextLane();
    ++sent_.frames_per_lane[lane];
    sent_.bytes += static_cast<int64_t>(frame.payload_bytes);
    if (!IsStaged(frame)) {
      sent_.shared_bytes += static_cast<int64_t>(frame.payload_bytes);
    }
  }
  kv_lanes_[lane]->Push(std::move(frame));
  return lane;
}

// Lane 0 always counts as attached: its stream is about to open, even if a frame is ready before.
int Delivery::NextLane() {
  int best = -1;
  size_t best_bytes = 0;
  const int num_lanes = static_cast<int>(kv_lanes_.size());
  for (int i = 1; i <= num_lanes; ++i) {
    const int lane = (last_lane_ + i) % num_lanes;
    if (lane > 0 && !kv_lanes_[lane]->attached()) continue;
    const size_t bytes = kv_lanes_[lane]->pending_bytes();
    if (best < 0 || bytes < best_bytes) {
      best = lane;
      best_bytes = bytes;
    }
  }
  last_lane_ = best;
  return best;
}

void Delivery::SendResult(v1::PrefillResult result) {
  {
    absl::MutexLock lock(&mu_);
    result.set_kv_bytes(sent_.bytes);
    result.set_shared_memory_bytes(sent_.shared_bytes);
    for (const int64_t frames : sent_.frames_per_lane) {
      result.add_frames_per_lane(frames);
      result.set_kv_frames(result.kv_frames() + frames);
    }
    result_ = result;
  }
  if (pushes_) return MaybePushResult();
  for (const auto& lane : side_lanes_) lane->Close();
  MaybeSendResult();
}

// The receiver continues from the cache. The log-probabilities go to the caller, who asked for
// them.
void Delivery::MaybePushResult() {
  v1::PrefillEvent last;
  {
    absl::MutexLock lock(&mu_);
    if (!result_.has_value() || pushed_result_) return;
    if (acknowledges_push_ &&
        !std::all_of(side_lanes_.begin(), side_lanes_.end(),
                     [](const auto& lane) { return lane->all_acknowledged(); })) {
      return;
    }
    pushed_result_ = true;
    *last.mutable_result() = *result_;
  }
  last.mutable_result()->clear_prompt_logprobs();
  last.mutable_result()->clear_best_logprobs();
  side_lanes_[0]->Close(std::move(last));
}

void Delivery::KeepUntilAcknowledged() {
  for (LaneQueue* const lane : kv_lanes_) lane->KeepUntilAcknowledged();
}

void Delivery::OnSideLaneDone(uint32_t lane) {
  {
    absl::MutexLock lock(&mu_);
    // A lane that is resumed when it had ended ends again.
    open_side_lanes_.erase(std::remove(open_side_lanes_.begin(), open_side_lanes_.end(), lane),
                           open_side_lanes_.end());
  }
  if (pushes_) {
    for (const auto& lane_queue : side_lanes_) {
      lane_queue->Abort(absl::CancelledError("the push is complete"));
    }
  }
  MaybeSendResult();
}

absl::StatusOr<int64_t> Delivery::Acknowledge(const v1::LaneReceipt& receipt) {
  PREFILLD_ASSIGN_OR_RETURN(LaneQueue* const lane, any_lane(receipt.lane()));
  const std::vector<uint64_t> damaged(receipt.damaged().begin(), receipt.damaged().end());
  PREFILLD_ASSIGN_OR_RETURN(const int64_t again, lane->Acknowledge(receipt.received(), damaged));
  MaybeSendResult();
  return again;
}

absl::StatusOr<int64_t> Delivery::AcknowledgePush(uint32_t lane, const v1::ReceiveReceipt& receipt,
                                                  bool goes_on) {
  PREFILLD_ASSIGN_OR_RETURN(LaneQueue* const queue, side_lane(lane));
  int64_t again = 0;
  if (goes_on) {
    PREFILLD_ASSIGN_OR_RETURN(again, queue->GoOnFrom(receipt.received()));
  }
  const std::vector<uint64_t> damaged(receipt.damaged().begin(), receipt.damaged().end());
  PREFILLD_ASSIGN_OR_RETURN(const int64_t repaired,
                            queue->Acknowledge(receipt.received(), damaged));
  MaybePushResult();
  return goes_on ? again : repaired;
}

bool Delivery::result_was_pushed() const {
  absl::MutexLock lock(&mu_);
  return pushed_result_;
}

void Delivery::FallBackToPlainPush() {
  {
    absl::MutexLock lock(&mu_);
    acknowledges_push_ = false;
    sent_.frames_per_lane.resize(1);
    if (result_.has_value()) result_->mutable_frames_per_lane()->Truncate(1);
  }
  side_lanes_[0]->ForgoResumption();
  MaybePushResult();
}

void Delivery::MaybeSendResult() {
  v1::PrefillEvent event;
  {
    absl::MutexLock lock(&mu_);
    if (!result_.has_value() || !open_side_lanes_.empty()) return;
    if (resumable_ && !control_->all_acknowledged()) return;
    *event.mutable_result() = *std::exchange(result_, std::nullopt);
  }
  result_is_out_.store(true, std::memory_order_release);
  control_->Close(std::move(event));
}

bool Delivery::HasDelivered(int64_t bytes) const {
  return sent().bytes == bytes &&
         std::all_of(kv_lanes_.begin(), kv_lanes_.end(),
                     [](const LaneQueue* lane) { return lane->held_frames().all == 0; });
}

void Delivery::Abort(const absl::Status& status) {
  for (const auto& lane : side_lanes_) lane->Abort(status);
  control_->Abort(status);
}

Delivery::ConsumerState Delivery::consumer(absl::Time now) {
  ConsumerState state;
  state.all_attached = std::all_of(side_lanes_.begin(), side_lanes_.end(),
                                   [](const auto& lane) { return lane->attached(); });
  state.control_idle = control_->idle();
  state.stalled = control_->StalledFor(now);
  state.away = control_->AwayFor(now);
  absl::Duration& lanes_away = pushes_ ? state.receiver_away : state.away;
  state.held_frames = control_->held_frames();
  for (const auto& lane : side_lanes_) {
    state.stalled = std::max(state.stalled, lane->StalledFor(now));
    lanes_away = std::max(lanes_away, lane->AwayFor(now));
    const LaneQueue::HeldFrames held = lane->held_frames();
    state.held_frames.all += held.all;
    state.held_frames.staged += held.staged;
  }
  for (const LaneQueue* lane : kv_lanes_) {
    const LaneQueue::Taken taken = lane->taken(now);
    state.kv_taken.payload_bytes += taken.payload_bytes;
    state.kv_taken.busy = std::max(state.kv_taken.busy, taken.busy);
  }
  return state;
}

Delivery::Sent Delivery::sent() const {
  absl::MutexLock lock(&mu_);
  return sent_;
}

}  // namespace prefilld::server
