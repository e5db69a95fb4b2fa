#include "model/prefill/layer_step.h"

#include <algorithm>
#include <cstring>
#include <random>

#include "absl/strings/str_cat.h"

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

absl::Status Assign(DeviceBuffer& buffer, absl::StatusOr<DeviceBuffer> allocated) {
  if (!allocated.ok()) return allocated.status();
  buffer = *std::move(allocated);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<LayerStep>> LayerStep::Create(
    Device* device, const ModelConfig* config, const Weights* weights, int64_t max_tokens,
    int64_t tile_tokens, int64_t max_batch_tokens) {
  tile_tokens = std::min(tile_tokens, max_tokens);
  std::unique_ptr<LayerStep> step(new LayerStep(device, config, weights, tile_tokens));
  absl::Status status = step->Allocate(max_tokens, max_batch_tokens);
  if (!status.ok()) return status;
  return step;
}

absl::Status LayerStep::Allocate(int64_t max_tokens, int64_t max_batch_tokens) {
  const size_t element = kernels::SizeOf(device_.traits().compute_dtype);
  const auto allocate = [&](DeviceBuffer& buffer, int64_t rows, int64_t width, size_t size) {
    return Assign(buffer, device_.Allocate(static_cast<size_t>(rows * width) * size));
  };
  absl::Status status = allocate(hidden_, max_tokens, config_.hidden, element);
  if (status.ok()) status = allocate(queries_, max_tokens, q_width(), element);
  if (status.ok()) status = allocate(normed_, tile_tokens_, config_.hidden, element);
  if (status.ok()) {
    const int64_t width = std::max(qkv_width(), 2 * config_.intermediate);
    status = allocate(wide_, 1, std::max(tile_tokens_ * width, config_.vocab_size), element);
  }
  if (status.ok()) status = allocate(gated_, tile_tokens_, config_.intermediate, element);
  if (status.ok()) status = allocate(token_ids_, tile_tokens_, 1, sizeof(uint32_t));
  if (status.ok() && max_batch_tokens > 0) {
    status = allocate(positions_, max_batch_tokens, 1, sizeof(int32_t));
  }
  if (status.ok()) status = allocate(inv_freq_, 1, config_.head_dim / 2, sizeof(float));
  if (status.ok()) status = allocate(logprobs_, 2, tile_tokens_, sizeof(float));
  return status;
}

absl::Status LayerStep::SetRotation(int64_t rope_tokens) {
  if (rope_tokens == rope_tokens_) return absl::OkStatus();
  RopeTable table = MakeRopeTable(config_, rope_tokens);
  rope_tokens_ = rope_tokens;
  rotation_.attention_factor = table.attention_factor;
  if (table.inv_freq == rotation_.inv_freq) return absl::OkStatus();
  rotation_.inv_freq = std::move(table.inv_freq);
  return device_.Upload(inv_freq_.data(), rotation_.inv_freq.data(),
                        rotation_.inv_freq.size() * sizeof(float));
}

absl::Status LayerStep::Embed(absl::Span<const uint32_t> tokens, int64_t first_position,
                              int64_t rope_tokens) {
  places_.assign(1, {0, static_cast<int64_t>(tokens.size())});
  first_position_ = first_position;
  absl::Status status = SetRotation(rope_tokens);
  return status.ok() ? EmbedTokens(tokens) : status;
}

absl::Status LayerStep::Embed(const PackedPrompts& prompts, int64_t rope_tokens) {
  places_.assign(prompts.places().begin(), prompts.places().end());
  first_position_ = 0;
  absl::Status status = SetRotation(rope_tokens);
  if (status.ok() && prompts.count() > 1) {
    const std::vector<int32_t> positions = prompts.Positions();
    status =
        device_.Upload(positions_.data(), positions.data(), positions.size() * sizeof(int32_t));
  }
  return status.ok() ? EmbedTokens(prompts.tokens()) : status;
}

absl::Status LayerStep::EmbedTokens(absl::Span<const uint32_t> tokens) {
  num_tokens_ = static_cast<int64_t>(tokens.size());
  absl::Status status;
  for (int64_t first = 0; first < num_tokens_ && status.ok(); first += tile_tokens_) {
    const int64_t count = std::min(tile_tokens_, num_tokens_ - first);
    status = device_.Upload(token_ids_.data(), &tokens[first], count * sizeof(uint32_t));
    if (!status.ok()) break;
    status = device_.ops().Embedding({.ids = token_ids_.as<uint32_t>(),
                                      .table = weights_.embedding.data(),
                                      .y = At(hidden_, first * config_.hidden),
                                      .num_tokens = count,
                                      .hidden = config_.hidden});
  }
  return status;
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

// The longest product first: while it is tried the device reaches the clock that it will have.
absl::Status LayerStep::TuneLinears() {
  const LayerWeights& weights = weights_.layers[0];
  absl::Status status = FillWithNoise(normed_.data(), tile_tokens_ * config_.hidden);
  if (status.ok()) status = FillWithNoise(gated_.data(), tile_tokens_ * config_.intermediate);
  if (status.ok()) status = FillWithNoise(queries_.data(), tile_tokens_ * q_width());
  if (status.ok()) status = FillWithNoise(hidden_.data(), tile_tokens_ * config_.hidden);
  if (status.ok()) status = device_.ops().TuneGatedLinear(GatedProduct(weights, tile_tokens_));
  for (const kernels::LinearParams& product :
       {DownProduct(weights, hidden_.data(), tile_tokens_),
        QkvProduct(weights, tile_tokens_, Heads::kAll),
        OutputProduct(weights, queries_.data(), hidden_.data(), tile_tokens_)}) {
    if (status.ok()) status = device_.ops().TuneLinear(product);
  }
  return status;
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
  absl::Status status;
  for (int64_t first = 0; first < elements && status.ok(); first += kPieceElements) {
    const int64_t count = std::min(kPieceElements, elements - first);
    status = device_.Upload(
        At(data, first), source,
        static_cast<size_t>(count) * kernels::SizeOf(device_.traits().compute_dtype));
  }
  return status;
}

absl::Status LayerStep::BeforeAttention(int layer, const KvDestination& kv) {
  absl::Status status;
  for (int64_t first = 0; first < num_tokens_ && status.ok(); first += tile_tokens_) {
    const int64_t count = std::min(tile_tokens_, num_tokens_ - first);
    status = Project(weights_.layers[layer], kv, first, count, Heads::kAll);
  }
  return status;
}

absl::Status LayerStep::BeforeLastAttention(int layer, const KvDestination& kv) {
  const LayerWeights& weights = weights_.layers[layer];
  absl::Status status;
  for (int64_t first = 0; first < num_tokens_ && status.ok(); first += tile_tokens_) {
    const int64_t count = std::min(tile_tokens_, num_tokens_ - first);
    status = Project(weights, kv, first, count, Heads::kKeysAndValues);
  }
  return status.ok() ? Project(weights, kv, last_token(), 1, Heads::kQueries) : status;
}

// Of `count` tokens, a tile at most, from `first` on. Queries alone go to the beginning of
// queries_.
absl::Status LayerStep::Project(const LayerWeights& weights, const KvDestination& kv, int64_t first,
                                int64_t count, Heads heads) {
  const int32_t* positions = places_.size() > 1 ? positions_.as<int32_t>() : nullptr;
  const bool queries_alone = heads == Heads::kQueries;
  absl::Status status = RmsNorm(At(hidden_, first * config_.hidden), weights.input_norm, count);
  if (status.ok()) status = device_.ops().Linear(QkvProduct(weights, count, heads));
  if (!status.ok()) return status;
  return device_.ops().QkvRope({.qkv = wide_.data(),
                                .q_norm = weights.q_norm.data(),
                                .k_norm = weights.k_norm.data(),
                                .inv_freq = inv_freq_.as<float>(),
                                .positions = positions ? positions + first : nullptr,
                                .q = At(queries_, queries_alone ? 0 : first * q_width()),
                                .k = At(kv.k, first * kv.token_stride),
                                .v = At(kv.v, first * kv.token_stride),
                                .num_tokens = count,
                                .first_position = first_position_ + first,
                                .kv_head_stride = kv.head_stride,
                                .kv_token_stride = kv.token_stride,
                                .num_heads = heads == Heads::kKeysAndValues ? 0 : config_.num_heads,
                                .num_kv_heads = queries_alone ? 0 : config_.num_kv_heads,
                                .head_dim = config_.head_dim,
                                .attention_factor = rotation_.attention_factor,
                                .norm_epsilon = static_cast<float>(config_.rms_norm_epsilon)});
}

absl::Status LayerStep::AfterAttention(int layer) {
  absl::Status status;
  for (int64_t first = 0; first < num_tokens_ && status.ok(); first += tile_tokens_) {
    status = FinishTile(weights_.layers[layer], At(queries_, first * q_width()),
                        At(hidden_, first * config_.hidden),
                        std::min(tile_tokens_, num_tokens_ - first));
  }
  return status;
}

absl::Status LayerStep::AfterLastAttention(int layer) {
  return FinishTile(weights_.layers[layer], queries_.data(),
                    At(hidden_, last_token() * config_.hidden), 1);
}

absl::Status LayerStep::FinishTile(const LayerWeights& weights, const void* queries, void* hidden,
                                   int64_t count) {
  absl::Status status = device_.ops().Linear(OutputProduct(weights, queries, hidden, count));
  if (status.ok()) status = RmsNorm(hidden, weights.post_norm, count);
  if (status.ok()) status = device_.ops().GatedLinear(GatedProduct(weights, count));
  if (status.ok()) status = device_.ops().Linear(DownProduct(weights, hidden, count));
  return status;
}

// As many as wide_ has room for: it holds nothing between BeforeAttention and AfterAttention, nor
// after the last layer.
int64_t LayerStep::LogitsPerTile() const {
  const int64_t logits_bytes =
      config_.vocab_size * static_cast<int64_t>(kernels::SizeOf(device_.traits().compute_dtype));
  return std::min(tile_tokens_, static_cast<int64_t>(wide_.bytes()) / logits_bytes);
}

absl::StatusOr<std::vector<std::vector<float>>> LayerStep::Logits() {
  std::vector<std::vector<float>> logits;
  const auto num_prompts = static_cast<int64_t>(places_.size());
  const int64_t tile = LogitsPerTile();
  for (int64_t first = 0; first < num_prompts; first += tile) {
    const int64_t count = std::min(tile, num_prompts - first);
    absl::Status status;
    for (int64_t i = 0; i < count && status.ok(); ++i) {
      const PromptPlace& place = places_[first + i];
      const int64_t last = place.first + place.count - 1;
      status = RmsNorm(At(hidden_, last * config_.hidden), weights_.final_norm, 1, /*to=*/i);
    }
    if (status.ok()) status = device_.ops().Linear(HeadProduct(count));
    for (int64_t i = 0; i < count && status.ok(); ++i) {
      logits.emplace_back(config_.vocab_size);
      status = DownloadAsFloat(At(wide_, i * config_.vocab_size), logits.back());
    }
    if (!status.ok()) return status;
  }
  return logits;
}

absl::Status LayerStep::DownloadAsFloat(const void* from, std::vector<float>& to) {
  if (device_.traits().compute_dtype == kernels::DType::kFp32) {
    return device_.Download(to.data(), from, to.size() * sizeof(float));
  }
  std::vector<uint16_t> bf16(to.size());
  absl::Status status = device_.Download(bf16.data(), from, bf16.size() * sizeof(uint16_t));
  std::transform(bf16.begin(), bf16.end(), to.begin(), Bf16ToFloat);
  return status;
}

absl::StatusOr<PromptLogprobs> LayerStep::LogprobsOf(int prompt, absl::Span<const uint32_t> tokens,
                                                     absl::FunctionRef<bool()> go_on) {
  PromptLogprobs result;
  const PromptPlace& place = places_[prompt];
  const int64_t num_scored = place.count - 1;
  const int64_t tile = LogitsPerTile();
  result.of_token.resize(num_scored);
  result.of_best.resize(num_scored);
  auto* logprobs = logprobs_.as<float>();
  for (int64_t first = 0; first < num_scored; first += tile) {
    if (!go_on()) {
      return absl::CancelledError(
          absl::StrCat("stopped after ", first, " of ", num_scored, " log-probabilities"));
    }
    const int64_t count = std::min(tile, num_scored - first);
    absl::Status status =
        RmsNorm(At(hidden_, (place.first + first) * config_.hidden), weights_.final_norm, count);
    if (status.ok()) status = device_.ops().Linear(HeadProduct(count));
    if (status.ok()) {
      status = device_.Upload(token_ids_.data(), &tokens[first + 1], count * sizeof(uint32_t));
    }
    if (status.ok()) {
      status = device_.ops().TokenLogprobs({.logits = wide_.data(),
                                            .targets = token_ids_.as<uint32_t>(),
                                            .logprobs = logprobs,
                                            .best_logprobs = logprobs + count,
                                            .num_tokens = count,
                                            .vocab_size = config_.vocab_size});
    }
    if (status.ok()) {
      status = device_.Download(&result.of_token[first], logprobs, count * sizeof(float));
    }
    if (status.ok()) {
      status = device_.Download(&result.of_best[first], logprobs + count, count * sizeof(float));
    }
    if (!status.ok()) return status;
  }
  return result;
}

}  // namespace prefilld::model
