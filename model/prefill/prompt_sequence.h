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
  void ReleaseKv(int layer) override;
  absl::Status PackCachedKv(int layer, const KvSelection& selection, void* dst) override;
  absl::StatusOr<std::vector<std::vector<float>>> FinalLogits() override;
  absl::StatusOr<PromptLogprobs> Logprobs(int prompt, int64_t first) override;
  AttentionPolicy policy() const override { return state_.options.policy; }
  int64_t cached_tokens() const override { return num_cached_; }
  double device_us() const override;

 private:
  const ModelConfig& config() const { return parts_.info.config; }
  int64_t kv_head_stride() const {
    return RoundUp(state_.num_tokens(), kKvStrideTokens) * config().head_dim;
  }
  // The size of a token's keys, or values, in one head.
  int64_t token_bytes() const {
    return config().head_dim * static_cast<int64_t>(kernels::SizeOf(parts_.info.native_dtype));
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
  // Takes the slot for a layer that is about to be started.
  absl::StatusOr<KvSlot> TakeSlot(int layer);
  // Lets the layer wait for its cached KV, and starts to load that of the next one.
  absl::Status LoadCached(int layer, const KvSlot& slot);
  absl::Status SaveComputed(int layer);
  // Makes what was saved visible to other prompts. What was found stays held until the end, since
  // packing threads may still read it.
  absl::Status PublishSaved();
  // Queues a layer's work, and the embedding before the first: the layer that is waited for, or the
  // one behind it. `report` gets what attention finds on the way.
  absl::Status StartLayer(int layer, const KvSlot& slot, LayerReport* report);
  absl::Status StartNextAhead();
  absl::Status Begin();
  absl::Status ComputeLayer(int layer, const KvSlot& slot, LayerReport* report);
  kernels::AttentionParams AttentionOf(int layer, const KvSlot& slot) const;
  // Waits for the layer.
  absl::Status FinishLayer(LayerReport* report);

  // Runs ops that come after the layers, and adds their time to device_us.
  absl::Status Timed(absl::FunctionRef<absl::Status()> ops);

  absl::Status CheckFinished() const;
  absl::Status CheckPrompt(int prompt) const;
  absl::Status CheckSelection(const KvSelection& selection) const;
  // Describes the packing of a prompt's blocks, but for where their KV lies.
  kernels::PackKvParams ParamsOf(const KvSelection& selection, void* dst) const;

  EngineParts& parts_;
  PromptState& state_;
  LayerStep& step_;
  // Unless logprobs will be asked for, only the last token of a prompt alone goes through all of
  // the last layer.
  const bool all_of_last_layer_;
  const int64_t num_cached_;  // packing threads ask for it
  const bool saves_;          // the layers go to the prefix cache
  double device_us_ = 0.0;  // of the layers that have been waited for, and of what came after them
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_PROMPT_SEQUENCE_H_
