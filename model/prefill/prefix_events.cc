#include "model/prefill/prefix_events.h"

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "model/prefill/prefix_cache.h"

namespace prefilld::model {

void PrefixEventLog::Append(const PrefixEvent& event) {
  if (capacity_ == 0) return;
  ++last_;
  if (events_.size() == capacity_) events_.pop_front();
  events_.push_back(event);
}

std::vector<PrefixEvent> PrefixEventLog::Read(uint64_t behind, size_t most) const {
  const auto left = static_cast<size_t>(last_ - behind);
  const auto begin = events_.end() - static_cast<std::ptrdiff_t>(left);
  return {begin, begin + static_cast<std::ptrdiff_t>(std::min(left, most))};
}

PrefixFollower::PrefixFollower(const PrefixCache& cache)
    : cache_(cache), began_at_(cache.last_event()), last_(began_at_) {}

absl::StatusOr<std::optional<PrefixFollower::Batch>> PrefixFollower::Next(size_t most) {
  Batch batch;
  if (in_snapshot_ && !IsBehind()) {
    batch.in_snapshot = true;
    batch.last = last_;
    batch.events = cache_.BlocksStored(snapshot_up_to_, began_at_, most, &snapshot_up_to_);
    if (!batch.events.empty()) return batch;
    batch.in_snapshot = false;
  }
  auto events = cache_.EventsBehind(last_, most);
  if (!events.has_value()) {
    return absl::AbortedError(
        absl::StrCat("the changes of the prefix cache were read too slowly: those behind number ",
                     last_, " are gone; start over"));
  }
  if (events->empty() && !in_snapshot_) return std::nullopt;
  in_snapshot_ = false;
  last_ += events->size();
  batch.last = last_;
  batch.events = *std::move(events);
  return batch;
}

bool PrefixFollower::IsBehind() const { return !cache_.KeepsEventsBehind(last_); }

}  // namespace prefilld::model
