#include "server/delivery.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "prefill/v1/receiver.pb.h"

namespace prefilld::server {

namespace v1 = ::prefill::v1;

Delivery::Delivery(int num_lanes, bool pushes, const Clock& clock)
    : clock_(clock), pushes_(pushes), control_(clock) {
  if (!pushes) kv_lanes_.push_back(&control_);
  while (kv_lanes_.size() < static_cast<size_t>(num_lanes)) {
    side_lanes_.push_back(std::make_unique<LaneQueue>(clock));
    kv_lanes_.push_back(side_lanes_.back().get());
  }
  open_side_lanes_ = static_cast<int>(side_lanes_.size());
  sent_.frames_per_lane.assign(kv_lanes_.size(), 0);
  next_sequence_.assign(kv_lanes_.size(), 0);
}

absl::StatusOr<LaneQueue*> Delivery::side_lane(uint32_t lane) {
  if (lane >= kv_lanes_.size() || kv_lanes_[lane] == &control_) {
    return absl::InvalidArgumentError(
        absl::StrCat("lane ", lane, "; lanes 1 to ", kv_lanes_.size() - 1, " can be attached"));
  }
  return kv_lanes_[lane];
}

bool Delivery::all_attached() const {
  return std::all_of(side_lanes_.begin(), side_lanes_.end(),
                     [](const auto& lane) { return lane->attached(); });
}

void Delivery::Send(const v1::PrefillEvent& event) {
  control_.Push(0, [message = wire::EncodeMessage(event)]() { return message; });
}

int Delivery::SendFrame(wire::FrameHeader header, StagingRing::Lease payload,
                        size_t payload_bytes) {
  int lane = 0;
  {
    absl::MutexLock lock(&mu_);
    lane = NextLane();
    header.lane = static_cast<uint32_t>(lane);
    ++sent_.frames_per_lane[lane];
    sent_.bytes += static_cast<int64_t>(payload_bytes);
  }
  kv_lanes_[lane]->Push(
      payload_bytes, [this, header, payload = std::move(payload), payload_bytes]() mutable {
        header.sequence = next_sequence_[header.lane]++;
        header.sent_at_us = absl::ToInt64Microseconds(clock_.Now() - started_at_);
        header.layers_computed = layers_computed_.load(std::memory_order_relaxed);
        return wire::EncodeFrame(header, ToSlice(std::move(payload), payload_bytes));
      });
  return lane;
}

// Lane 0 is always a candidate: its stream exists, though the first frame may be faster.
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
    for (const int64_t frames : sent_.frames_per_lane) {
      result.add_frames_per_lane(frames);
      result.set_kv_frames(result.kv_frames() + frames);
    }
    result_ = result;
  }
  if (pushes_) {
    // The receiver goes on from the cache; how likely the prompt is, the caller asked.
    result.clear_prompt_logprobs();
    result.clear_best_logprobs();
    v1::ReceiveRequest last;
    *last.mutable_result() = std::move(result);
    side_lanes_[0]->Close([message = wire::EncodeMessage(last)]() { return message; });
  }
  for (const auto& lane : side_lanes_) lane->Close();
  MaybeSendResult();
}

void Delivery::OnSideLaneDone() {
  {
    absl::MutexLock lock(&mu_);
    --open_side_lanes_;
  }
  MaybeSendResult();
}

void Delivery::MaybeSendResult() {
  v1::PrefillEvent event;
  {
    absl::MutexLock lock(&mu_);
    if (!result_.has_value() || open_side_lanes_ > 0) return;
    *event.mutable_result() = *std::exchange(result_, std::nullopt);
  }
  control_.Close([message = wire::EncodeMessage(event)]() { return message; });
}

void Delivery::Abort(const absl::Status& status) {
  for (const auto& lane : side_lanes_) lane->Abort(status);
  control_.Abort(status);
}

absl::Duration Delivery::StalledFor(absl::Time now) const {
  absl::Duration longest = control_.StalledFor(now);
  for (const auto& lane : side_lanes_) longest = std::max(longest, lane->StalledFor(now));
  return longest;
}

LaneQueue::Taken Delivery::KvTaken(absl::Time now) const {
  LaneQueue::Taken sum;
  for (const LaneQueue* lane : kv_lanes_) {
    const LaneQueue::Taken taken = lane->taken(now);
    sum.payload_bytes += taken.payload_bytes;
    sum.busy = std::max(sum.busy, taken.busy);
  }
  return sum;
}

Delivery::Sent Delivery::sent() const {
  absl::MutexLock lock(&mu_);
  return sent_;
}

}  // namespace prefilld::server
