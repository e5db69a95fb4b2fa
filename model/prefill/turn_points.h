// The points inside a layer at which other prompts may go first.
#ifndef PREFILLD_MODEL_PREFILL_TURN_POINTS_H_
#define PREFILLD_MODEL_PREFILL_TURN_POINTS_H_

#include <array>
#include <cstdint>
#include <optional>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "model/device/device.h"
#include "model/sparse/layer_pauses.h"

namespace prefilld::model {

// The times of a layer that is interrupted, in microseconds by the device's clock.
struct InterruptedTimes {
  double own_us = 0.0;                                 // of the parts before the last point
  std::array<double, kNumLayerStages> others_us = {};  // of others, at the points of each stage
};

// A layer of a long prompt takes long, so whoever computes it comes by here between its parts:
// tiles of tokens, groups of heads, and ranges of their query blocks. Here a listener may run
// layers of other sequences, which use a workspace of their own, or stop the layer.
//
// At each point the host waits for the part before the one that it has just queued. So what the
// listener queues waits for little, and the device always has the next part to compute. Therefore
// the time of a part, and of what came behind it, is known at the next point only, or by Settle.
// Only the compute thread uses it.
class TurnPoints final : public LayerPauses {
 public:
  static constexpr int kNumMarks = 4;

  // Uses the device's marks from `first_mark` on. `most_attention_work` is for LayerPauses.
  TurnPoints(Device* device, int first_mark, int64_t most_attention_work = 0)
      : device_(*device), first_mark_(first_mark), most_attention_work_(most_attention_work) {}

  // Names the listener of the points that come. It must live until End. It returns whether the
  // layer should go on.
  void Begin(absl::FunctionRef<bool()> listener) { listener_.emplace(listener); }
  void End() { listener_.reset(); }

  // Tells that the parts that are queued from now on belong to another layer, which begins at the
  // device's mark `begin_mark`. Its times go to `times`, which must live as long as this.
  void StartLayer(InterruptedTimes* times, int begin_mark);
  // Sets the times of a layer back to zero, those that were not known yet included.
  void Reset(InterruptedTimes* times);

  // Does nothing when there is no listener, or when it is called by the listener.
  absl::Status Reach(LayerStage stage) override;
  int64_t most_attention_work() const override { return most_attention_work_; }

  // Completes the times of a layer all of whose work the device has passed.
  absl::Status Settle(const InterruptedTimes& times);

 private:
  // A part behind which others may have computed. The marks are its begin and its end, and where
  // the layer goes on.
  struct Part {
    InterruptedTimes* times;
    LayerStage stage;
    int begin, end, resumed;
  };

  absl::Status SettleLastPart();

  Device& device_;
  const int first_mark_;
  const int64_t most_attention_work_;
  std::optional<absl::FunctionRef<bool()>> listener_;
  bool listening_ = false;
  int num_reached_ = 0;                // of all layers
  InterruptedTimes* times_ = nullptr;  // of the layer that is being queued
  int part_begins_ = 0;                // the mark
  std::optional<Part> last_part_;      // its times are not known yet
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_TURN_POINTS_H_
