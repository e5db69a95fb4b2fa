// The sequence of the real engine: a prompt, or a batch of them, layer by layer.
#ifndef PREFILLD_MODEL_PREFILL_PROMPT_SEQUENCE_H_
#define PREFILLD_MODEL_PREFILL_PROMPT_SEQUENCE_H_

#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/prefill/engine_parts.h"
#include "model/prefill/prefill_engine.h"
#include "model/prefill/prompt_state.h"

namespace prefilld::model {

// Drives one state through the layers. Several sequences may exist and take turns: all that a
// sequence leaves behind between two calls is in its state.
class PromptSequence final : public PrefillSequence {
 public:
  // Takes `state`, which has been started, from the pool of `parts` until its destruction gives it
  // back.
  PromptSequence(EngineParts* parts, PromptState* state);
  ~PromptSequence() override;

  absl::StatusOr<LayerReport> RunLayer(absl::FunctionRef<bool()> at_point) override;
  bool may_interject() const override { return &step_ == parts_.short_step.get(); }
  absl::Status PackKv(int layer, const KvSelection& selection, void* dst) override;
  void ReleaseKv(int layer) override { state_.slots->Release(layer); }
  absl::StatusOr<std::vector<std::vector<float>>> FinalLogits() override;
  absl::StatusOr<PromptLogprobs> Logprobs(int prompt, absl::FunctionRef<bool()> go_on) override;
  AttentionPolicy policy() const override { return state_.options.policy; }

 private:
  const ModelConfig& config() const { return parts_.info.config; }
  int64_t kv_head_stride() const {
    return RoundUp(state_.num_tokens(), kKvStrideTokens) * config().head_dim;
  }
  // Tells whether only the prompt's last query is computed in this layer.
  bool LastQueryAlone(int layer) const {
    return layer + 1 == config().num_layers && !all_of_last_layer_;
  }
  AttentionStrategy& StrategyOf(int layer) const {
    return LastQueryAlone(layer) ? state_.dense : state_.strategy();
  }
  bool IsRecorded(int layer) const;
  Device::RecordingKey KeyOf(int layer, const KvSlot& slot) const;

  absl::StatusOr<LayerReport> RunNextLayer();
  // Queues a layer's work, and the embedding before the first: the layer that is waited for, or the
  // one behind it. `report` gets what attention finds on the way.
  absl::Status StartLayer(int layer, const KvSlot& slot, LayerReport* report);
  absl::Status StartNextAhead();
  absl::Status Begin();
  absl::Status ComputeLayer(int layer, const KvSlot& slot, LayerReport* report);
  kernels::AttentionParams AttentionOf(int layer, const KvSlot& slot) const;
  // Waits for the layer.
  absl::Status FinishLayer(LayerReport* report);

  absl::Status CheckFinished() const;
  absl::Status CheckPrompt(int prompt) const;
  absl::Status CheckSelection(const KvSelection& selection) const;

  EngineParts& parts_;
  PromptState& state_;
  LayerStep& step_;
  // Unless logprobs will be asked for, only the last token of a prompt alone goes through all of
  // the last layer.
  const bool all_of_last_layer_;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_PROMPT_SEQUENCE_H_
