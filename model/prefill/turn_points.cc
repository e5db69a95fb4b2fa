#include "model/prefill/turn_points.h"

#include "proto/status_macros.h"

namespace prefilld::model {

void TurnPoints::StartLayer(InterruptedTimes* times, int begin_mark) {
  Reset(times);
  times_ = times;
  part_begins_ = begin_mark;
}

void TurnPoints::Reset(InterruptedTimes* times) {
  if (last_part_.has_value() && last_part_->times == times) last_part_.reset();
  *times = {};
}

absl::Status TurnPoints::Reach(LayerStage stage) {
  if (!listener_.has_value() || listening_) return absl::OkStatus();
  const int parity = num_reached_++ % 2;
  const Part part = {times_, stage, part_begins_, first_mark_ + parity, first_mark_ + 2 + parity};
  PREFILLD_RETURN_IF_ERROR(device_.Mark(part.end));
  PREFILLD_RETURN_IF_ERROR(SettleLastPart());
  listening_ = true;
  const bool go_on = (*listener_)();
  listening_ = false;
  PREFILLD_RETURN_IF_ERROR(device_.Mark(part.resumed));
  part_begins_ = part.resumed;
  last_part_ = part;
  return go_on ? absl::OkStatus() : absl::CancelledError("the layer was stopped between its parts");
}

absl::Status TurnPoints::Settle(const InterruptedTimes& times) {
  return last_part_.has_value() && last_part_->times == &times ? SettleLastPart()
                                                               : absl::OkStatus();
}

absl::Status TurnPoints::SettleLastPart() {
  if (!last_part_.has_value()) return absl::OkStatus();
  const Part part = *last_part_;
  last_part_.reset();
  PREFILLD_ASSIGN_OR_RETURN(const double own, device_.ElapsedUs(part.begin, part.end));
  PREFILLD_ASSIGN_OR_RETURN(const double others, device_.ElapsedUs(part.end, part.resumed));
  part.times->own_us += own;
  part.times->others_us[static_cast<size_t>(part.stage)] += others;
  return absl::OkStatus();
}

}  // namespace prefilld::model
