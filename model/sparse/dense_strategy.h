// Exact attention: each query attends to all keys before it, or to those of a block pattern that
// all heads share.
#ifndef PREFILLD_MODEL_SPARSE_DENSE_STRATEGY_H_
#define PREFILLD_MODEL_SPARSE_DENSE_STRATEGY_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "kernels/attention.h"
#include "model/device/device.h"
#include "model/sparse/attention_strategy.h"
#include "model/sparse/layer_pauses.h"

namespace prefilld::model {

// Serves dense prompts, batches by their block-diagonal pattern, and the last query of any prompt.
// Two layers may be under way at a time, so each has its own marks on the device's time line.
class DenseStrategy final : public AttentionStrategy {
 public:
  static constexpr int kNumMarks = 4;

  // `pauses` is reached between the parts of a long prompt's attention.
  //
  // `pattern` is device memory (kernels/attention.h) that is filled when a prompt starts, or null
  // for all keys. Uses the device's marks from `first_mark` on. The pointers are borrowed and
  // must outlive this.
  DenseStrategy(Device* device, LayerPauses* pauses, int num_heads, const uint32_t* pattern,
                int first_mark);

  void StartPrompt(int64_t num_tokens, const AttentionOptions& options) override;
  absl::Status Attend(int layer, const kernels::AttentionParams& attention,
                      LayerReport* report) override;
  // Counts no head if only a last query was computed, as LayerReport says.
  absl::Status Report(LayerReport* report) override;
  bool only_queues() const override { return true; }

 private:
  int BeginMark(int layer) const { return first_mark_ + layer % 2; }
  int DoneMark(int layer) const { return first_mark_ + 2 + layer % 2; }

  Device& device_;
  LayerPauses& pauses_;
  const int first_mark_;
  std::vector<kernels::HeadWork> work_;  // [num_heads]
  int64_t num_tokens_ = 0;               // of the prompt or batch
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_DENSE_STRATEGY_H_
