#include "model/prefill/layer_step.h"

#include <algorithm>
#include <cstring>
#include <random>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace prefilld::model {
namespace {

float Bf16ToFloat(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

uint16_t FloatToBf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);  // cut off, not rounded: for noise
}

int64_t LastTokenOf(const PromptPlace& place) { return place.first + place.count - 1; }

}  // namespace

absl::StatusOr<std::unique_ptr<LayerStep>> LayerStep::Create(
    Device* device, const ModelConfig* config, const Weights* weights, int64_t max_tokens,
    int64_t tile_tokens, LayerPauses* pauses) {
  std::unique_ptr<LayerStep> step(
      new LayerStep(device, config, weights, std::min(tile_tokens, max_tokens), pauses));
  PREFILLD_RETURN_IF_ERROR(step->Allocate(max_tokens));
  return step;
}

absl::Status LayerStep::Allocate(int64_t max_tokens) {
  const size_t element = kernels::SizeOf(device_.traits().compute_dtype);
  const int64_t width = std::max(qkv_width(), 2 * config_.intermediate);
  const struct {
    DeviceBuffer& buffer;
    int64_t count;
    size_t size;
  } wanted[] = {
      {queries_, max_tokens * q_width(), element},
      {normed_, tile_tokens_ * config_.hidden, element},
      {wide_, std::max(tile_tokens_ * width, config_.vocab_size), element},
      {gated_, tile_tokens_ * config_.intermediate, element},
      {token_ids_, tile_tokens_, sizeof(uint32_t)},
      {logprobs_, 2 * tile_tokens_, sizeof(float)},
  };
  for (const auto& [buffer, count, size] : wanted) {
    PREFILLD_ASSIGN_OR_RETURN(buffer, device_.Allocate(static_cast<size_t>(count) * size));
  }
  return absl::OkStatus();
}

absl::Status LayerStep::SetRotation(HiddenStates& states, int64_t rope_tokens) {
  if (rope_tokens == states.rope_tokens) return absl::OkStatus();
  RopeTable table = MakeRopeTable(config_, rope_tokens);
  states.rope_tokens = rope_tokens;
  states.rotation.attention_factor = table.attention_factor;
  if (table.inv_freq == states.rotation.inv_freq) return absl::OkStatus();
  states.rotation.inv_freq = std::move(table.inv_freq);
  return device_.Upload(states.inv_freq.data(), states.rotation.inv_freq.data(),
                        states.rotation.inv_freq.size() * sizeof(float));
}

absl::Status LayerStep::Embed(HiddenStates& states, absl::Span<const uint32_t> tokens,
                              int64_t first_position, int64_t rope_tokens) {
  states.places.assign(1, {0, static_cast<int64_t>(tokens.size())});
  states.first_position = first_position;
  PREFILLD_RETURN_IF_ERROR(SetRotation(states, rope_tokens));
  return EmbedTokens(states, tokens);
}

absl::Status LayerStep::Embed(HiddenStates& states, const PackedPrompts& prompts,
                              int64_t rope_tokens) {
  states.places.assign(prompts.places().begin(), prompts.places().end());
  states.first_position = 0;
  PREFILLD_RETURN_IF_ERROR(SetRotation(states, rope_tokens));
  if (prompts.count() > 1) {
    const std::vector<int32_t> positions = prompts.Positions();
    PREFILLD_RETURN_IF_ERROR(device_.Upload(states.positions.data(), positions.data(),
                                            positions.size() * sizeof(int32_t)));
  }
  return EmbedTokens(states, prompts.tokens());
}

absl::Status LayerStep::EmbedTokens(HiddenStates& states, absl::Span<const uint32_t> tokens) {
  states.num_tokens = static_cast<int64_t>(tokens.size());
  for (int64_t first = 0; first < states.num_tokens; first += tile_tokens_) {
    const int64_t count = std::min(tile_tokens_, states.num_tokens - first);
    PREFILLD_RETURN_IF_ERROR(
        device_.Upload(token_ids_.data(), &tokens[first], count * sizeof(uint32_t)));
    PREFILLD_RETURN_IF_ERROR(
        device_.ops().Embedding({.ids = token_ids_.as<uint32_t>(),
                                 .table = weights_.embedding.data(),
                                 .y = At(states.values, first * config_.hidden),
                                 .num_tokens = count,
                                 .hidden = config_.hidden}));
  }
  return absl::OkStatus();
}

absl::Status LayerStep::RmsNorm(const void* x, const DeviceBuffer& weight, int64_t num_tokens,
                                int64_t to) {
  return device_.ops().RmsNorm({.x = x,
                                .weight = weight.data(),
                                .y = At(normed_, to * config_.hidden),
                                .num_tokens = num_tokens,
                                .hidden = config_.hidden,
                                .epsilon = static_cast<float>(config_.rms_norm_epsilon)});
}

kernels::LinearParams LayerStep::QkvProduct(const LayerWeights& weights, int64_t count,
                                            Heads heads) const {
  const int64_t first = heads == Heads::kKeysAndValues ? q_width() : 0;
  const int64_t end = heads == Heads::kQueries ? q_width() : qkv_width();
  void* bias = weights.qkv_bias.data();
  return {.x = normed_.data(),
          .w = At(weights.qkv, first * config_.hidden),
          .bias = bias != nullptr ? At(bias, first) : nullptr,
          .y = wide_.data(),
          .num_tokens = count,
          .in_features = config_.hidden,
          .out_features = end - first};
}

kernels::LinearParams LayerStep::OutputProduct(const LayerWeights& weights, const void* queries,
                                               void* y, int64_t count) const {
  return {.x = queries,
          .w = weights.output.data(),
          .bias = weights.output_bias.data(),
          .y = y,
          .num_tokens = count,
          .in_features = q_width(),
          .out_features = config_.hidden,
          .accumulate = true};
}

kernels::GatedLinearParams LayerStep::GatedProduct(const LayerWeights& weights,
                                                   int64_t count) const {
  return {.x = normed_.data(),
          .w = weights.gate_up.data(),
          .gate_up = wide_.data(),
          .y = gated_.data(),
          .num_tokens = count,
          .in_features = config_.hidden,
          .intermediate = config_.intermediate};
}

kernels::LinearParams LayerStep::DownProduct(const LayerWeights& weights, void* y,
                                             int64_t count) const {
  return {.x = gated_.data(),
          .w = weights.down.data(),
          .y = y,
          .num_tokens = count,
          .in_features = config_.intermediate,
          .out_features = config_.hidden,
          .accumulate = true};
}

kernels::LinearParams LayerStep::HeadProduct(int64_t count) const {
  return {.x = normed_.data(),
          .w = weights_.head_data(),
          .y = wide_.data(),
          .num_tokens = count,
          .in_features = config_.hidden,
          .out_features = config_.vocab_size};
}

// The longest product comes first, so that the device reaches its working clock while it is tried.
absl::Status LayerStep::TuneLinears(HiddenStates& any) {
  const LayerWeights& weights = weights_.layers[0];
  void* hidden = any.values.data();
  PREFILLD_RETURN_IF_ERROR(FillWithNoise(normed_.data(), tile_tokens_ * config_.hidden));
  PREFILLD_RETURN_IF_ERROR(FillWithNoise(gated_.data(), tile_tokens_ * config_.intermediate));
  PREFILLD_RETURN_IF_ERROR(FillWithNoise(queries_.data(), tile_tokens_ * q_width()));
  PREFILLD_RETURN_IF_ERROR(FillWithNoise(hidden, tile_tokens_ * config_.hidden));
  PREFILLD_RETURN_IF_ERROR(device_.ops().TuneGatedLinear(GatedProduct(weights, tile_tokens_)));
  for (const kernels::LinearParams& product :
       {DownProduct(weights, hidden, tile_tokens_), QkvProduct(weights, tile_tokens_, Heads::kAll),
        OutputProduct(weights, queries_.data(), hidden, tile_tokens_)}) {
    PREFILLD_RETURN_IF_ERROR(device_.ops().TuneLinear(product));
  }
  return absl::OkStatus();
}

absl::Status LayerStep::FillWithNoise(void* data, int64_t elements) {
  constexpr int64_t kPieceElements = int64_t{1} << 20;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> piece(static_cast<size_t>(std::min(elements, kPieceElements)));
  std::generate(piece.begin(), piece.end(), [&] { return normal(random); });
  std::vector<uint16_t> bf16(piece.size());
  std::transform(piece.begin(), piece.end(), bf16.begin(), FloatToBf16);
  const void* source = bf16.data();
  if (device_.traits().compute_dtype == kernels::DType::kFp32) source = piece.data();
  const size_t element = kernels::SizeOf(device_.traits().compute_dtype);
  for (int64_t first = 0; first < elements; first += kPieceElements) {
    const int64_t count = std::min(kPieceElements, elements - first);
    PREFILLD_RETURN_IF_ERROR(
        device_.Upload(At(data, first), source, static_cast<size_t>(count) * element));
  }
  return absl::OkStatus();
}

absl::Status LayerStep::BeforeAttention(const HiddenStates& states, int layer,
                                        const KvDestination& kv) {
  for (int64_t first = 0; first < states.num_tokens; first += tile_tokens_) {
    const int64_t count = std::min(tile_tokens_, states.num_tokens - first);
    PREFILLD_RETURN_IF_ERROR(
        Project(states, weights_.layers[layer], kv, first, count, Heads::kAll));
    PREFILLD_RETURN_IF_ERROR(Pause());
  }
  return absl::OkStatus();
}

absl::Status LayerStep::BeforeLastAttention(const HiddenStates& states, int layer,
                                            const KvDestination& kv) {
  const LayerWeights& weights = weights_.layers[layer];
  for (int64_t first = 0; first < states.num_tokens; first += tile_tokens_) {
    const int64_t count = std::min(tile_tokens_, states.num_tokens - first);
    PREFILLD_RETURN_IF_ERROR(Project(states, weights, kv, first, count, Heads::kKeysAndValues));
    PREFILLD_RETURN_IF_ERROR(Pause());
  }
  return Project(states, weights, kv, LastTokenOf(states.places.back()), 1, Heads::kQueries);
}

absl::Status LayerStep::Project(const HiddenStates& states, const LayerWeights& weights,
                                const KvDestination& kv, int64_t first, int64_t count,
                                Heads heads) {
  const int32_t* positions = states.places.size() > 1 ? states.positions.as<int32_t>() : nullptr;
  const bool queries_alone = heads == Heads::kQueries;
  PREFILLD_RETURN_IF_ERROR(
      RmsNorm(At(states.values, first * config_.hidden), weights.input_norm, count));
  PREFILLD_RETURN_IF_ERROR(device_.ops().Linear(QkvProduct(weights, count, heads)));
  return device_.ops().QkvRope({.qkv = wide_.data(),
                                .q_norm = weights.q_norm.data(),
                                .k_norm = weights.k_norm.data(),
                                .inv_freq = states.inv_freq.as<float>(),
                                .positions = positions ? positions + first : nullptr,
                                .q = At(queries_, queries_alone ? 0 : first * q_width()),
                                .k = At(kv.k, first * kv.token_stride),
                                .v = At(kv.v, first * kv.token_stride),
                                .num_tokens = count,
                                .first_position = states.first_position + first,
                                .kv_head_stride = kv.head_stride,
                                .kv_token_stride = kv.token_stride,
                                .num_heads = heads == Heads::kKeysAndValues ? 0 : config_.num_heads,
                                .num_kv_heads = queries_alone ? 0 : config_.num_kv_heads,
                                .head_dim = config_.head_dim,
                                .attention_factor = states.rotation.attention_factor,
                                .norm_epsilon = static_cast<float>(config_.rms_norm_epsilon)});
}

absl::Status LayerStep::AfterAttention(HiddenStates& states, int layer) {
  for (int64_t first = 0; first < states.num_tokens; first += tile_tokens_) {
    PREFILLD_RETURN_IF_ERROR(FinishTile(weights_.layers[layer], At(queries_, first * q_width()),
                                        At(states.values, first * config_.hidden),
                                        std::min(tile_tokens_, states.num_tokens - first)));
    PREFILLD_RETURN_IF_ERROR(Pause());
  }
  return absl::OkStatus();
}

absl::Status LayerStep::AfterLastAttention(HiddenStates& states, int layer) {
  const int64_t last = LastTokenOf(states.places.back());
  return FinishTile(weights_.layers[layer], queries_.data(),
                    At(states.values, last * config_.hidden), 1);
}

absl::Status LayerStep::FinishTile(const LayerWeights& weights, const void* queries, void* hidden,
                                   int64_t count) {
  PREFILLD_RETURN_IF_ERROR(device_.ops().Linear(OutputProduct(weights, queries, hidden, count)));
  PREFILLD_RETURN_IF_ERROR(RmsNorm(hidden, weights.post_norm, count));
  PREFILLD_RETURN_IF_ERROR(device_.ops().GatedLinear(GatedProduct(weights, count)));
  return device_.ops().Linear(DownProduct(weights, hidden, count));
}

// The logits of a tile are written to wide_, which holds nothing between BeforeAttention and
// AfterAttention, nor after the last layer.
int64_t LayerStep::LogitsPerTile() const {
  const int64_t logits_bytes =
      config_.vocab_size * static_cast<int64_t>(kernels::SizeOf(device_.traits().compute_dtype));
  return std::min(tile_tokens_, static_cast<int64_t>(wide_.bytes()) / logits_bytes);
}

absl::StatusOr<std::vector<std::vector<float>>> LayerStep::Logits(const HiddenStates& states) {
  std::vector<std::vector<float>> logits;
  const auto num_prompts = static_cast<int64_t>(states.places.size());
  const int64_t tile = LogitsPerTile();
  for (int64_t first = 0; first < num_prompts; first += tile) {
    const int64_t count = std::min(tile, num_prompts - first);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t last = LastTokenOf(states.places[first + i]);
      PREFILLD_RETURN_IF_ERROR(
          RmsNorm(At(states.values, last * config_.hidden), weights_.final_norm, 1, /*to=*/i));
    }
    PREFILLD_RETURN_IF_ERROR(device_.ops().Linear(HeadProduct(count)));
    for (int64_t i = 0; i < count; ++i) {
      logits.emplace_back(config_.vocab_size);
      PREFILLD_RETURN_IF_ERROR(DownloadAsFloat(At(wide_, i * config_.vocab_size), logits.back()));
    }
  }
  return logits;
}

absl::Status LayerStep::DownloadAsFloat(const void* from, std::vector<float>& to) {
  if (device_.traits().compute_dtype == kernels::DType::kFp32) {
    return device_.Download(to.data(), from, to.size() * sizeof(float));
  }
  std::vector<uint16_t> bf16(to.size());
  PREFILLD_RETURN_IF_ERROR(device_.Download(bf16.data(), from, bf16.size() * sizeof(uint16_t)));
  std::transform(bf16.begin(), bf16.end(), to.begin(), Bf16ToFloat);
  return absl::OkStatus();
}

absl::StatusOr<PromptLogprobs> LayerStep::LogprobsOf(const HiddenStates& states, int prompt,
                                                     absl::Span<const uint32_t> tokens,
                                                     int64_t first) {
  PromptLogprobs result;
  const PromptPlace& place = states.places[prompt];
  const int64_t count = std::min(LogitsPerTile(), place.count - 1 - first);
  if (count <= 0) return result;
  result.of_token.resize(count);
  result.of_best.resize(count);
  auto* logprobs = logprobs_.as<float>();
  PREFILLD_RETURN_IF_ERROR(RmsNorm(At(states.values, (place.first + first) * config_.hidden),
                                   weights_.final_norm, count));
  PREFILLD_RETURN_IF_ERROR(device_.ops().Linear(HeadProduct(count)));
  PREFILLD_RETURN_IF_ERROR(
      device_.Upload(token_ids_.data(), &tokens[first + 1], count * sizeof(uint32_t)));
  PREFILLD_RETURN_IF_ERROR(device_.ops().TokenLogprobs({.logits = wide_.data(),
                                                        .targets = token_ids_.as<uint32_t>(),
                                                        .logprobs = logprobs,
                                                        .best_logprobs = logprobs + count,
                                                        .num_tokens = count,
                                                        .vocab_size = config_.vocab_size}));
  const size_t bytes = count * sizeof(float);
  PREFILLD_RETURN_IF_ERROR(device_.Download(result.of_token.data(), logprobs, bytes));
  PREFILLD_RETURN_IF_ERROR(device_.Download(result.of_best.data(), logprobs + count, bytes));
  return result;
}

}  // namespace prefilld::model
