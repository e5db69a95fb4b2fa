#include "proto/wire/lane_patience.h"

#include <algorithm>

namespace prefilld::wire {
namespace {

// Before a request is accepted its window is not known, and another server may take it.
constexpr int kMaxAttemptsBeforeAccepted = 3;
constexpr int kMaxStarts = 3;
constexpr absl::Duration kFirstPause = absl::Milliseconds(20);
constexpr absl::Duration kLongestPause = absl::Milliseconds(200);

// The end of a stream that a broken connection may have, or a damaged message.
bool MayBeTheConnections(const absl::Status& status, bool accepted) {
  switch (status.code()) {
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kUnknown:
    case absl::StatusCode::kDataLoss:
      return true;
    case absl::StatusCode::kResourceExhausted:  // a damaged length asks for too large a message
      return accepted;
    default:
      return false;
  }
}

}  // namespace

LanePatience::Next LanePatience::OnBroken(const absl::Status& ended, const State& state,
                                          absl::Time now) {
  if (heard_at_.has_value()) broken_at_ += now - *heard_at_;
  heard_at_.reset();
  if (progress_ != state.progress) {
    progress_ = state.progress;
    broken_at_ = now;
    attempts_ = 0;
    reason_ = ended;
  }
  if (attempts_ > 0 && (absl::IsNotFound(ended) || absl::IsUnimplemented(ended))) {
    if (state.accepted || absl::IsUnimplemented(ended) || ++starts_ > kMaxStarts) {
      return Next::kGiveUp;
    }
    attempts_ = 0;
    return Next::kStartAnew;
  }
  // The request that went unheard was heard after all.
  if (starts_ > 0 && absl::IsAlreadyExists(ended) && attempts_ == 0) {
    ++attempts_;
    return Next::kResume;
  }
  if (!MayBeTheConnections(ended, state.accepted)) {
    reason_ = ended;
    return Next::kGiveUp;
  }
  const bool is_late =
      state.accepted ? now - broken_at_ >= state.window : attempts_ >= kMaxAttemptsBeforeAccepted;
  if (is_late) return Next::kGiveUp;
  ++attempts_;
  return Next::kResume;
}

absl::Duration LanePatience::pause() const {
  if (attempts_ < 2) return absl::ZeroDuration();
  return std::min(kFirstPause * (1 << std::min(attempts_ - 2, 10)), kLongestPause);
}

}  // namespace prefilld::wire
