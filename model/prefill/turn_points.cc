#include "model/prefill/turn_points.h"

#include "proto/status_macros.h"

namespace prefilld::model {

void TurnPoints::Begin(absl::FunctionRef<bool()> listener) {
  listener_.emplace(listener);
  num_reached_ = 0;
}

absl::Status TurnPoints::Reach() {
  if (!listener_.has_value() || listening_) return absl::OkStatus();
  const int mark = first_mark_ + num_reached_ % 2;
  const int before = first_mark_ + (num_reached_ + 1) % 2;
  PREFILLD_RETURN_IF_ERROR(device_.Mark(mark));
  if (num_reached_++ > 0) PREFILLD_RETURN_IF_ERROR(device_.ElapsedUs(before, before).status());
  listening_ = true;
  const bool go_on = (*listener_)();
  listening_ = false;
  return go_on ? absl::OkStatus() : absl::CancelledError("the layer was stopped between its parts");
}

}  // namespace prefilld::model
