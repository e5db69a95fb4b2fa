#include "server/retained_frames.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace prefilld::server {

void RetainedFrames::Add(KvFrame frame) {
  bytes_ += static_cast<int64_t>(frame.payload_bytes);
  if (IsStaged(frame)) ++staged_;
  frames_.push_back(std::move(frame));
}

absl::Status RetainedFrames::CheckAcknowledged(uint64_t received) const {
  if (received <= end()) return absl::OkStatus();
  return absl::OutOfRangeError(
      absl::StrCat("received ", received, "; ", end(), " frames of the lane were sent"));
}

absl::Status RetainedFrames::CheckResumable(uint64_t received) const {
  if (received >= first_) return CheckAcknowledged(received);
  return absl::OutOfRangeError(absl::StrCat("received ", received, "; the lane's frames before ",
                                            first_, " were acknowledged and are gone"));
}

std::deque<KvFrame> RetainedFrames::Release(uint64_t received) {
  std::deque<KvFrame> released;
  while (first_ < received && !frames_.empty()) {
    bytes_ -= static_cast<int64_t>(frames_.front().payload_bytes);
    if (IsStaged(frames_.front())) --staged_;
    released.push_back(std::move(frames_.front()));
    frames_.pop_front();
    ++first_;
  }
  again_.erase(std::remove_if(again_.begin(), again_.end(),
                              [this](uint64_t sequence) { return sequence < first_; }),
               again_.end());
  absl::erase_if(damaged_copies_, [this](const auto& entry) { return entry.first < first_; });
  return released;
}

absl::StatusOr<bool> RetainedFrames::SendAgain(uint64_t sequence) {
  if (sequence < first_ || sequence >= end()) return false;
  if (std::find(again_.begin(), again_.end(), sequence) != again_.end()) return false;
  if (++damaged_copies_[sequence] > kMaxDamagedCopies) {
    return absl::AbortedError(absl::StrCat("damaged: ", damaged_copies_[sequence],
                                           " copies of frame ", sequence, "; at most ",
                                           kMaxDamagedCopies));
  }
  again_.push_back(sequence);
  return true;
}

void RetainedFrames::SendAllAgain() {
  again_.clear();
  for (uint64_t sequence = first_; sequence < end(); ++sequence) again_.push_back(sequence);
}

std::optional<KvFrame> RetainedFrames::NextAgain() {
  if (again_.empty()) return std::nullopt;
  const KvFrame& frame = frames_[again_.front() - first_];
  again_.pop_front();
  return frame;
}

std::deque<KvFrame> RetainedFrames::TakeAll() {
  again_.clear();
  damaged_copies_.clear();
  first_ = end();
  bytes_ = staged_ = 0;
  return std::exchange(frames_, {});
}

}  // namespace prefilld::server
