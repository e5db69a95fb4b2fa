// The points inside a layer at which other prompts may go first.
#ifndef PREFILLD_MODEL_PREFILL_TURN_POINTS_H_
#define PREFILLD_MODEL_PREFILL_TURN_POINTS_H_

#include <optional>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "model/device/device.h"
#include "model/sparse/layer_pauses.h"

namespace prefilld::model {

// A layer of a long prompt takes long, so whoever computes it comes by here between its parts:
// tiles of tokens, and groups of heads. Here a listener may run layers of other sequences, which
// use a workspace of their own, or stop the layer.
//
// At each point the host waits for the part before the one that it has just queued. So what the
// listener queues waits for little, and the device always has the next part to compute. Only the
// compute thread uses it.
class TurnPoints final : public LayerPauses {
 public:
  static constexpr int kNumMarks = 2;

  // Uses the device's marks from `first_mark` on.
  TurnPoints(Device* device, int first_mark) : device_(*device), first_mark_(first_mark) {}

  // Names the listener of the layer that begins. It must live until End. It returns whether the
  // layer should go on.
  void Begin(absl::FunctionRef<bool()> listener);
  void End() { listener_.reset(); }

  // Does nothing when there is no listener, or when it is called by the listener.
  absl::Status Reach() override;

 private:
  Device& device_;
  const int first_mark_;
  std::optional<absl::FunctionRef<bool()>> listener_;
  bool listening_ = false;
  int num_reached_ = 0;  // in this layer
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_TURN_POINTS_H_
