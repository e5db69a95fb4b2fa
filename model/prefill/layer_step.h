// The part of a decoder layer that is computed token by token, which is everything but attention.
#ifndef PREFILLD_MODEL_PREFILL_LAYER_STEP_H_
#define PREFILLD_MODEL_PREFILL_LAYER_STEP_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "model/checkpoint/config.h"
#include "model/checkpoint/weights.h"
#include "model/device/device.h"
#include "model/prefill/hidden_states.h"
#include "model/prefill/packed_prompts.h"
#include "model/prefill/prompt_logprobs.h"
#include "model/sparse/layer_pauses.h"

namespace prefilld::model {

// The destination of a layer's keys and values: KV head h of token t goes to element h *
// head_stride + t * token_stride. This covers the engine's head-major slots and the decoder's paged
// blocks.
struct KvDestination {
  void* k = nullptr;
  void* v = nullptr;
  int64_t head_stride = 0;
  int64_t token_stride = 0;
};

// The layer step, written once for all devices and for prefill and decode alike. A run is
//   Embed, then per layer: BeforeAttention, the caller's attention from queries() to queries()
//   (in place), AfterAttention, and at the end Logits and LogprobsOf, in any order.
// Logits reads one row of a prompt's last hidden states. Whoever wants no more than that calls
// BeforeLastAttention and AfterLastAttention in the last layer.
//
// A run's state is the HiddenStates that every call is given. The step itself holds scratch:
// queries for all tokens, everything wider for one tile of tokens at a time. Nothing in it outlives
// AfterAttention, so runs may take turns between layers. Create allocates all device memory. Not
// thread-safe.
class LayerStep {
 public:
  // `device`, `config` and `weights` are borrowed and must outlive the step, as must `pauses`,
  // which is reached behind every tile of tokens. Null: nobody wants to go first.
  static absl::StatusOr<std::unique_ptr<LayerStep>> Create(Device* device,
                                                           const ModelConfig* config,
                                                           const Weights* weights,
                                                           int64_t max_tokens, int64_t tile_tokens,
                                                           LayerPauses* pauses = nullptr);

  // Finds the fastest way to compute the products of a whole tile, by trying with noise and the
  // weights of layer 0. Must be called before the first run. `any` is overwritten and must have
  // room for a tile. If two ways are equally fast, the choice may differ from start to start, and
  // with it the last bit of results.
  absl::Status TuneLinears(HiddenStates& any);

  // Starts a run of these tokens of one prompt, at most max_tokens of them, the first at
  // `first_position`. `rope_tokens` is the length of the prompt that the rotation is made for.
  absl::Status Embed(HiddenStates& states, absl::Span<const uint32_t> tokens,
                     int64_t first_position, int64_t rope_tokens);
  // Starts a run of whole prompts that share one rotation, padding included. Several prompts must
  // fit into the positions of `states`.
  absl::Status Embed(HiddenStates& states, const PackedPrompts& prompts, int64_t rope_tokens);

  // Computes norm, projection and rotation: fills queries() and the keys and values of all tokens.
  absl::Status BeforeAttention(const HiddenStates& states, int layer, const KvDestination& kv);

  // Adds the output projection and then the MLP to the hidden states.
  absl::Status AfterAttention(HiddenStates& states, int layer);

  // These do the same for the last token of one prompt alone, whose query is then at the beginning
  // of queries(). Keys and values are still computed for all tokens. LogprobsOf must not follow.
  absl::Status BeforeLastAttention(const HiddenStates& states, int layer, const KvDestination& kv);
  absl::Status AfterLastAttention(HiddenStates& states, int layer);

  // Returns the logits of every prompt's last token, [prompts of the run][vocab_size].
  absl::StatusOr<std::vector<std::vector<float>>> Logits(const HiddenStates& states);

  // Returns a tile of a prompt's log-probabilities: the entries from `first` on, none when there
  // are no more. `tokens` are the prompt's. A tile takes no longer than the gate and up projections
  // of a layer's tile.
  absl::StatusOr<PromptLogprobs> LogprobsOf(const HiddenStates& states, int prompt,
                                            absl::Span<const uint32_t> tokens, int64_t first);

  // The queries, [num_tokens, num_heads, head_dim] in device memory.
  void* queries() const { return queries_.data(); }

 private:
  LayerStep(Device* device, const ModelConfig* config, const Weights* weights, int64_t tile_tokens,
            LayerPauses* pauses)
      : device_(*device),
        config_(*config),
        weights_(*weights),
        tile_tokens_(tile_tokens),
        pauses_(pauses) {}

  // The heads that a product of the fused projection computes.
  enum class Heads { kAll, kQueries, kKeysAndValues };

  absl::Status Allocate(int64_t max_tokens);
  absl::Status Pause() {
    return pauses_ == nullptr ? absl::OkStatus() : pauses_->Reach(LayerStage::kTokens);
  }
  absl::Status SetRotation(HiddenStates& states, int64_t rope_tokens);
  absl::Status EmbedTokens(HiddenStates& states, absl::Span<const uint32_t> tokens);
  int64_t LogitsPerTile() const;
  absl::Status DownloadAsFloat(const void* from, std::vector<float>& to);
  // Writes to normed_, from its row `to` on.
  absl::Status RmsNorm(const void* x, const DeviceBuffer& weight, int64_t num_tokens,
                       int64_t to = 0);
  // Projects and rotates `count` tokens, a tile at most, from `first` on. Queries alone go to the
  // beginning of queries_.
  absl::Status Project(const HiddenStates& states, const LayerWeights& weights,
                       const KvDestination& kv, int64_t first, int64_t count, Heads heads);
  absl::Status FinishTile(const LayerWeights& weights, const void* queries, void* hidden,
                          int64_t count);
  // These describe the products of a layer and of the head for `count` tokens. The result is added
  // to y.
  kernels::LinearParams QkvProduct(const LayerWeights& weights, int64_t count, Heads heads) const;
  kernels::LinearParams OutputProduct(const LayerWeights& weights, const void* queries, void* y,
                                      int64_t count) const;
  kernels::GatedLinearParams GatedProduct(const LayerWeights& weights, int64_t count) const;
  kernels::LinearParams DownProduct(const LayerWeights& weights, void* y, int64_t count) const;
  kernels::LinearParams HeadProduct(int64_t count) const;
  absl::Status FillWithNoise(void* data, int64_t elements);
  int64_t q_width() const { return int64_t{config_.num_heads} * config_.head_dim; }
  int64_t qkv_width() const {
    return q_width() + 2 * int64_t{config_.num_kv_heads} * config_.head_dim;
  }

  // Returns a pointer to element `index` of a tensor in the compute dtype.
  void* At(const DeviceBuffer& buffer, int64_t index) const { return At(buffer.data(), index); }
  void* At(void* data, int64_t index) const {
    return static_cast<char*>(data) + index * kernels::SizeOf(device_.traits().compute_dtype);
  }

  Device& device_;
  const ModelConfig& config_;
  const Weights& weights_;
  const int64_t tile_tokens_;
  LayerPauses* const pauses_;

  DeviceBuffer queries_;    // [max_tokens, num_heads * head_dim]
  DeviceBuffer normed_;     // [tile_tokens, hidden]
  DeviceBuffer wide_;       // [tile_tokens, qkv width or 2 * intermediate]; at least [vocab_size]
  DeviceBuffer gated_;      // [tile_tokens, intermediate]
  DeviceBuffer token_ids_;  // [tile_tokens]
  DeviceBuffer logprobs_;   // [2, tile_tokens]: of tokens, of the likeliest
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_LAYER_STEP_H_
