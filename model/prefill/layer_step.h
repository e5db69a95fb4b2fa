// A decoder layer around its attention: what is computed token by token.
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
#include "model/prefill/packed_prompts.h"
#include "model/prefill/prompt_logprobs.h"

namespace prefilld::model {

// Where a layer's keys and values go: KV head h of token t at h * head_stride + t * token_stride
// elements. Covers the engine's head-major slots and the decoder's paged blocks.
struct KvDestination {
  void* k = nullptr;
  void* v = nullptr;
  int64_t head_stride = 0;
  int64_t token_stride = 0;
};

// The layer step, written once for all devices and for prefill and decode alike. One run is
//   Embed, then per layer: BeforeAttention, the caller's attention from queries() to queries()
//   (in place), AfterAttention, and at the end Logits and LogprobsOf, in any order.
// Of the last layer's hidden states Logits reads one row: whoever wants no more than that of a
// prompt calls BeforeLastAttention and AfterLastAttention there.
// Holds the activations of one run: hidden states and queries for all tokens, everything wider for
// one tile of tokens at a time. All device memory is allocated by Create. Not thread-safe.
class LayerStep {
 public:
  // `device`, `config` and `weights` are borrowed and outlive the step.
  static absl::StatusOr<std::unique_ptr<LayerStep>> Create(Device* device,
                                                           const ModelConfig* config,
                                                           const Weights* weights,
                                                           int64_t max_tokens, int64_t tile_tokens,
                                                           int64_t max_batch_tokens);

  // Finds the fastest way to compute the products of a whole tile, by trying with noise and the
  // weights of layer 0. Before the first Embed. What wins may differ from start to start where two
  // are equally fast, and with it the last bit of results.
  absl::Status TuneLinears();

  // Starts over with these tokens of one prompt, at most max_tokens of them, the first at
  // `first_position`. `rope_tokens` is the length of the prompt that the rotation is made for.
  absl::Status Embed(absl::Span<const uint32_t> tokens, int64_t first_position,
                     int64_t rope_tokens);
  // Starts over with whole prompts that one rotation fits, padding included; several of at most
  // max_batch_tokens in all.
  absl::Status Embed(const PackedPrompts& prompts, int64_t rope_tokens);

  // Norm, projection, rotation: fills queries() and the keys and values of all tokens.
  absl::Status BeforeAttention(int layer, const KvDestination& kv);

  // Output projection and MLP, each added to the hidden states.
  absl::Status AfterAttention(int layer);

  // The same for the last token of one prompt alone, which queries() then begins with, but for the
  // keys and values: those of all tokens. LogprobsOf must not follow.
  absl::Status BeforeLastAttention(int layer, const KvDestination& kv);
  absl::Status AfterLastAttention(int layer);

  // Logits of every prompt's last token, [prompts of the run][vocab_size].
  absl::StatusOr<std::vector<std::vector<float>>> Logits();

  // What the hidden states say of every token of a prompt but its first; `tokens` are the prompt's.
  // Asks `go_on` before each tile, none of which takes longer than the gate and up projections of a
  // layer's: CANCELLED as soon as it says no.
  absl::StatusOr<PromptLogprobs> LogprobsOf(int prompt, absl::Span<const uint32_t> tokens,
                                            absl::FunctionRef<bool()> go_on);

  // Of the rotation of this run.
  float attention_factor() const { return rotation_.attention_factor; }

  // [num_tokens, num_heads, head_dim] in device memory.
  void* queries() const { return queries_.data(); }

 private:
  LayerStep(Device* device, const ModelConfig* config, const Weights* weights, int64_t tile_tokens)
      : device_(*device), config_(*config), weights_(*weights), tile_tokens_(tile_tokens) {}

  // Of the fused projection.
  enum class Heads { kAll, kQueries, kKeysAndValues };

  absl::Status Allocate(int64_t max_tokens, int64_t max_batch_tokens);
  absl::Status SetRotation(int64_t rope_tokens);
  absl::Status EmbedTokens(absl::Span<const uint32_t> tokens);
  int64_t LogitsPerTile() const;
  absl::Status DownloadAsFloat(const void* from, std::vector<float>& to);
  // Into normed_, from its row `to` on.
  absl::Status RmsNorm(const void* x, const DeviceBuffer& weight, int64_t num_tokens,
                       int64_t to = 0);
  absl::Status Project(const LayerWeights& weights, const KvDestination& kv, int64_t first,
                       int64_t count, Heads heads);
  absl::Status FinishTile(const LayerWeights& weights, const void* queries, void* hidden,
                          int64_t count);
  // The products of a layer and of the head, for `count` tokens; y is what is added to.
  kernels::LinearParams QkvProduct(const LayerWeights& weights, int64_t count, Heads heads) const;
  kernels::LinearParams OutputProduct(const LayerWeights& weights, const void* queries, void* y,
                                      int64_t count) const;
  kernels::GatedLinearParams GatedProduct(const LayerWeights& weights, int64_t count) const;
  kernels::LinearParams DownProduct(const LayerWeights& weights, void* y, int64_t count) const;
  kernels::LinearParams HeadProduct(int64_t count) const;
  absl::Status FillWithNoise(void* data, int64_t elements);
  int64_t last_token() const { return places_.back().first + places_.back().count - 1; }
  int64_t q_width() const { return int64_t{config_.num_heads} * config_.head_dim; }
  int64_t qkv_width() const {
    return q_width() + 2 * int64_t{config_.num_kv_heads} * config_.head_dim;
  }

  // Pointer to element `index` of a tensor in the compute dtype.
  void* At(const DeviceBuffer& buffer, int64_t index) const { return At(buffer.data(), index); }
  void* At(void* data, int64_t index) const {
    return static_cast<char*>(data) + index * kernels::SizeOf(device_.traits().compute_dtype);
  }

  Device& device_;
  const ModelConfig& config_;
  const Weights& weights_;
  const int64_t tile_tokens_;

  DeviceBuffer hidden_;     // [max_tokens, hidden]
  DeviceBuffer queries_;    // [max_tokens, num_heads * head_dim]
  DeviceBuffer normed_;     // [tile_tokens, hidden]
  DeviceBuffer wide_;       // [tile_tokens, qkv width or 2 * intermediate]; at least [vocab_size]
  DeviceBuffer gated_;      // [tile_tokens, intermediate]
  DeviceBuffer token_ids_;  // [tile_tokens]
  DeviceBuffer positions_;  // [max_batch_tokens] int32, of several prompts
  DeviceBuffer inv_freq_;   // [head_dim / 2]
  DeviceBuffer logprobs_;   // [2, tile_tokens]: of tokens, of the likeliest

  // The run.
  int64_t num_tokens_ = 0;
  int64_t first_position_ = 0;       // of one prompt
  std::vector<PromptPlace> places_;  // several: positions_ holds
  RopeTable rotation_;
  int64_t rope_tokens_ = 0;  // what rotation_ was made for; 0: nothing yet
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_LAYER_STEP_H_
