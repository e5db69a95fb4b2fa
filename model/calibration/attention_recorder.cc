#include "model/calibration/attention_recorder.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace prefilld::model {
namespace {

constexpr int64_t kTileTokens = 1024;
constexpr int64_t kKvStrideTokens = 128;  // KV heads begin at multiples, so that whole tiles load
constexpr int64_t kBlockMassBytes = int64_t{256} << 20;
constexpr int64_t kFloatBytes = sizeof(float);

int64_t CausalBlocks(int64_t num_blocks) { return num_blocks * (num_blocks + 1) / 2; }

}  // namespace

int64_t CellBlocks(int64_t num_tokens, const RecorderOptions& options) {
  const int64_t blocks = kernels::CeilDiv(num_tokens, options.block_tokens);
  return options.max_grid == 0 ? 1 : kernels::CeilDiv(blocks, options.max_grid);
}

std::vector<TensorShape> RecordedTensors(const ModelConfig& config, int64_t num_tokens,
                                         const RecorderOptions& options) {
  const int64_t heads = config.num_heads;
  const int64_t blocks = kernels::CeilDiv(num_tokens, options.block_tokens);
  const int64_t cells = kernels::CeilDiv(blocks, CellBlocks(num_tokens, options));
  std::vector<TensorShape> tensors;
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const std::string prefix = absl::StrCat("layers.", layer, ".");
    tensors.push_back({prefix + "estimate", {heads, blocks}});
    tensors.push_back({prefix + "vertical", {heads, num_tokens}});
    tensors.push_back({prefix + "slash", {heads, num_tokens}});
    tensors.push_back({prefix + "block_mass", {heads, cells, cells}});
    tensors.push_back({prefix + "vertical_slash_mass", {heads}});
    tensors.push_back({prefix + "vertical_slash_density", {heads}});
  }
  return tensors;
}

std::map<std::string, std::string> CalibrationMetadata(const ModelConfig& config,
                                                       const std::string& fingerprint,
                                                       int64_t num_tokens,
                                                       const RecorderOptions& options) {
  return {{"format", "prefilld-calibration-1"},
          {"model_fingerprint", fingerprint},
          {"num_layers", absl::StrCat(config.num_layers)},
          {"num_heads", absl::StrCat(config.num_heads)},
          {"num_tokens", absl::StrCat(num_tokens)},
          {"block_tokens", absl::StrCat(options.block_tokens)},
          {"cell_blocks", absl::StrCat(CellBlocks(num_tokens, options))},
          {"gamma", absl::StrCat(options.gamma)},
          {"min_budget_tokens", absl::StrCat(options.min_budget_tokens)}};
}

void JoinBlocks(absl::Span<const float> mass, int64_t num_tokens, int block_tokens,
                int64_t cell_blocks, absl::Span<float> cells) {
  const int64_t blocks = kernels::CeilDiv(num_tokens, block_tokens);
  const int64_t width = kernels::CeilDiv(blocks, cell_blocks);
  std::vector<double> row_of_cells(width);
  for (int64_t cell = 0; cell < width; ++cell) {
    std::fill(row_of_cells.begin(), row_of_cells.end(), 0.0);
    const int64_t first = cell * cell_blocks;
    const int64_t end = std::min(first + cell_blocks, blocks);
    for (int64_t row = first; row < end; ++row) {
      // The last block may have fewer queries, and then weighs accordingly less.
      const int64_t queries = std::min<int64_t>(block_tokens, num_tokens - row * block_tokens);
      for (int64_t column = 0; column <= row; ++column) {
        row_of_cells[column / cell_blocks] +=
            static_cast<double>(queries) * mass[row * blocks + column];
      }
    }
    const int64_t queries = std::min(end * block_tokens, num_tokens) - first * block_tokens;
    for (int64_t i = 0; i < width; ++i) {
      cells[cell * width + i] = static_cast<float>(row_of_cells[i] / static_cast<double>(queries));
    }
  }
}

absl::StatusOr<std::unique_ptr<AttentionRecorder>> AttentionRecorder::Create(
    Device* device, const ModelConfig* config, const Weights* weights,
    const RecorderOptions& options) {
  std::unique_ptr<AttentionRecorder> recorder(new AttentionRecorder(device, config, options));
  PREFILLD_RETURN_IF_ERROR(recorder->Allocate(weights));
  return recorder;
}

absl::Status AttentionRecorder::Allocate(const Weights* weights) {
  PREFILLD_ASSIGN_OR_RETURN(
      step_, LayerStep::Create(&device_, &config_, weights, options_.max_tokens, kTileTokens));
  PREFILLD_ASSIGN_OR_RETURN(states_, HiddenStates::Create(&device_, config_, options_.max_tokens,
                                                          /*max_batch_tokens=*/0));
  PREFILLD_ASSIGN_OR_RETURN(estimate_,
                            HeadEstimate::Create(&device_, config_.num_heads, options_.max_tokens,
                                                 options_.block_tokens));

  const int64_t heads = config_.num_heads;
  const int64_t tokens = options_.max_tokens;
  const int64_t blocks = kernels::CeilDiv(tokens, options_.block_tokens);
  const int64_t words = kernels::PatternWords(blocks);
  const int64_t mass_bytes = blocks * blocks * kFloatBytes;
  const int64_t kv_bytes = config_.num_kv_heads * config_.head_dim *
                           kernels::CeilDiv(tokens, kKvStrideTokens) * kKvStrideTokens *
                           static_cast<int64_t>(kernels::SizeOf(device_.traits().compute_dtype));
  const struct {
    DeviceBuffer& buffer;
    int64_t bytes;
  } wanted[] = {
      {keys_, kv_bytes},
      {values_, kv_bytes},
      {vertical_slash_patterns_, heads * blocks * words * int64_t{sizeof(uint32_t)}},
      {block_mass_, std::clamp(kBlockMassBytes, mass_bytes, mass_bytes * heads)},
      {pattern_mass_, heads * int64_t{sizeof(double)}},
      {pattern_blocks_, heads * int64_t{sizeof(int64_t)}},
  };
  for (const auto& [buffer, bytes] : wanted) {
    PREFILLD_ASSIGN_OR_RETURN(buffer, device_.Allocate(static_cast<size_t>(bytes)));
  }
  return absl::OkStatus();
}

int64_t AttentionRecorder::kv_head_stride() const {
  return kernels::CeilDiv(num_tokens_, kKvStrideTokens) * kKvStrideTokens * config_.head_dim;
}

absl::Status AttentionRecorder::Record(absl::Span<const uint32_t> tokens, SafetensorsWriter& file,
                                       absl::FunctionRef<void(int layer)> progress) {
  num_tokens_ = static_cast<int64_t>(tokens.size());
  num_blocks_ = kernels::CeilDiv(num_tokens_, options_.block_tokens);
  PREFILLD_RETURN_IF_ERROR(step_->Embed(states_, tokens, /*first_position=*/0, num_tokens_));
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    PREFILLD_RETURN_IF_ERROR(step_->BeforeAttention(states_, layer,
                                                    {.k = keys_.data(),
                                                     .v = values_.data(),
                                                     .head_stride = kv_head_stride(),
                                                     .token_stride = config_.head_dim}));
    PREFILLD_RETURN_IF_ERROR(RecordEstimate(file));
    PREFILLD_RETURN_IF_ERROR(RecordMass(file));
    PREFILLD_RETURN_IF_ERROR(RecordVerticalSlash(file));
    PREFILLD_RETURN_IF_ERROR(step_->AfterAttention(states_, layer));
    progress(layer);
  }
  return absl::OkStatus();
}

kernels::AttentionParams AttentionRecorder::Attention() const {
  return {.q = step_->queries(),
          .k = keys_.data(),
          .v = values_.data(),
          .out = step_->queries(),
          .num_queries = num_tokens_,
          .num_keys = num_tokens_,
          .kv_head_stride = kv_head_stride(),
          .num_heads = config_.num_heads,
          .num_kv_heads = config_.num_kv_heads,
          .head_dim = config_.head_dim,
          .block_tokens = options_.block_tokens,
          .scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim))};
}

absl::Status AttentionRecorder::RecordEstimate(SafetensorsWriter& file) {
  PREFILLD_RETURN_IF_ERROR(estimate_->OfLastQueries(Attention()));
  PREFILLD_RETURN_IF_ERROR(estimate_->BuildVerticalSlash(options_.gamma, options_.min_budget_tokens,
                                                         vertical_slash_patterns_.as<uint32_t>(),
                                                         /*blocks=*/nullptr));
  const int64_t heads = config_.num_heads;
  PREFILLD_RETURN_IF_ERROR(AppendFromDevice(estimate_->block_mass(), heads * num_blocks_, file));
  PREFILLD_RETURN_IF_ERROR(AppendFromDevice(estimate_->vertical(), heads * num_tokens_, file));
  return AppendFromDevice(estimate_->slash(), heads * num_tokens_, file);
}

absl::Status AttentionRecorder::RecordMass(SafetensorsWriter& file) {
  const int64_t mass_floats = num_blocks_ * num_blocks_;
  const int at_a_time = static_cast<int>(std::min<int64_t>(
      config_.num_heads, static_cast<int64_t>(block_mass_.bytes()) / (mass_floats * kFloatBytes)));
  const int64_t cell_blocks = CellBlocks(num_tokens_, options_);
  const int64_t width = kernels::CeilDiv(num_blocks_, cell_blocks);
  host_.resize(mass_floats);
  cells_.resize(width * width);
  std::vector<kernels::HeadWork> work;
  for (int first = 0; first < config_.num_heads; first += at_a_time) {
    const int end = std::min(first + at_a_time, config_.num_heads);
    work.clear();
    for (int head = first; head < end; ++head) {
      work.push_back(
          {.head = head, .block_mass = block_mass_.as<float>() + (head - first) * mass_floats});
    }
    kernels::AttentionParams attention = Attention();
    attention.work = work.data();
    attention.num_work = static_cast<int>(work.size());
    PREFILLD_RETURN_IF_ERROR(device_.ops().Attention(attention));
    for (const kernels::HeadWork& head : work) {
      PREFILLD_RETURN_IF_ERROR(MeasureVerticalSlash(head.head, head.block_mass));
      PREFILLD_RETURN_IF_ERROR(
          device_.Download(host_.data(), head.block_mass, mass_floats * kFloatBytes));
      JoinBlocks(host_, num_tokens_, options_.block_tokens, cell_blocks, absl::MakeSpan(cells_));
      PREFILLD_RETURN_IF_ERROR(file.Append(cells_));
    }
  }
  return absl::OkStatus();
}

absl::Status AttentionRecorder::MeasureVerticalSlash(int head, const float* block_mass) {
  return device_.ops().MeasurePattern(
      {.block_mass = block_mass,
       .pattern = vertical_slash_patterns_.as<uint32_t>() + head * pattern_words(),
       .num_query_blocks = num_blocks_,
       .num_key_blocks = num_blocks_,
       .mass = pattern_mass_.as<double>() + head,
       .blocks = pattern_blocks_.as<int64_t>() + head});
}

absl::Status AttentionRecorder::RecordVerticalSlash(SafetensorsWriter& file) {
  const size_t heads = static_cast<size_t>(config_.num_heads);
  std::vector<double> mass(heads);
  std::vector<int64_t> blocks(heads);
  PREFILLD_RETURN_IF_ERROR(
      device_.Download(mass.data(), pattern_mass_.data(), heads * sizeof(double)));
  PREFILLD_RETURN_IF_ERROR(
      device_.Download(blocks.data(), pattern_blocks_.data(), heads * sizeof(int64_t)));
  host_.assign(mass.begin(), mass.end());
  const double causal = static_cast<double>(CausalBlocks(num_blocks_));
  for (int64_t count : blocks) {
    host_.push_back(static_cast<float>(static_cast<double>(count) / causal));
  }
  return file.Append(host_);
}

absl::Status AttentionRecorder::AppendFromDevice(const DeviceBuffer& buffer, int64_t count,
                                                 SafetensorsWriter& file) {
  host_.resize(count);
  PREFILLD_RETURN_IF_ERROR(device_.Download(host_.data(), buffer.data(), count * kFloatBytes));
  return file.Append(host_);
}

}  // namespace prefilld::model
