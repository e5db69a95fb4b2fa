// The sequence of the real engine: a prompt, or a batch of them, layer by layer over a device.
#ifndef PREFILLD_MODEL_PREFILL_PROMPT_SEQUENCE_H_
#define PREFILLD_MODEL_PREFILL_PROMPT_SEQUENCE_H_

#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/attention.h"
#include "model/prefill/engine_parts.h"
#include "model/prefill/packed_prompts.h"
#include "model/prefill/prefill_engine.h"

namespace prefilld::model {

class PromptSequence final : public PrefillSequence {
 public:
  // Takes `parts`, whose `busy` is set, until its destruction clears that. `options` with the
  // policy resolved, dense for several prompts. Unless `logprobs` will be asked for, of a prompt
  // alone only the last token goes through all of the last layer.
  PromptSequence(EngineParts* parts, PackedPrompts prompts, const AttentionOptions& options,
                 bool logprobs);
  ~PromptSequence() override;

  absl::StatusOr<LayerReport> RunLayer() override;
  absl::Status PackKv(int layer, const KvSelection& selection, void* dst) override;
  void ReleaseKv(int layer) override { parts_.slots->Release(layer); }
  absl::StatusOr<std::vector<std::vector<float>>> FinalLogits() override;
  absl::StatusOr<PromptLogprobs> Logprobs(int prompt, absl::FunctionRef<bool()> go_on) override;
  AttentionPolicy policy() const override { return policy_; }

 private:
  const ModelConfig& config() const { return parts_.info.config; }
  bool is_batch() const { return prompts_.count() > 1; }
  // Of all prompts, padding included.
  int64_t num_tokens() const { return static_cast<int64_t>(prompts_.tokens().size()); }
  int64_t kv_head_stride() const {
    return RoundUp(num_tokens(), kKvStrideTokens) * config().head_dim;
  }
  bool IsLast(int layer) const { return layer + 1 == config().num_layers; }
  // Whether no query but the prompt's last is computed.
  bool LastQueryAlone(int layer) const { return IsLast(layer) && !all_of_last_layer_; }
  bool IsDense(int layer) const {
    return policy_ == AttentionPolicy::kDense || LastQueryAlone(layer);
  }
  bool IsRecorded(int layer) const;
  Device::RecordingKey KeyOf(int layer, const KvSlot& slot) const;

  // Queues a layer's work, the embedding before the first; at most the layer behind the one that is
  // waited for. `report` gets what attention finds on the way.
  absl::Status StartLayer(int layer, const KvSlot& slot, LayerReport* report);
  absl::Status StartNextAhead();
  absl::Status Begin();
  absl::Status ComputeLayer(int layer, const KvSlot& slot, LayerReport* report);
  absl::Status Attend(int layer, const KvSlot& slot, LayerReport* report);
  // Waits for the layer.
  absl::Status FinishLayer(LayerReport* report);
  absl::Status ReportAttention(LayerReport* report);

  absl::Status CheckFinished() const;
  absl::Status CheckPrompt(int prompt) const;
  absl::Status CheckSelection(const KvSelection& selection) const;

  EngineParts& parts_;
  const PackedPrompts prompts_;
  const AttentionPolicy policy_;
  const bool logprobs_;
  const bool all_of_last_layer_;
  int started_layers_ = 0;
  int next_layer_ = 0;    // to be waited for
  absl::Status failure_;  // of a layer: the hidden states are lost with it
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_PROMPT_SEQUENCE_H_
