#include "model/decode/decoder.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "model/checkpoint/weights.h"
#include "model/prefill/hidden_states.h"
#include "model/prefill/layer_step.h"
#include "proto/status_macros.h"

namespace prefilld::model {
namespace {

// Walks through bytes that lie in pieces.
class PieceReader {
 public:
  explicit PieceReader(absl::Span<const absl::Span<const uint8_t>> pieces) : pieces_(pieces) {}

  // Returns the next bytes that lie together: at most `limit`, at least one. There must be some.
  absl::Span<const uint8_t> Next(size_t limit) {
    while (offset_ == pieces_.front().size()) {
      pieces_.remove_prefix(1);
      offset_ = 0;
    }
    const absl::Span<const uint8_t> next = pieces_.front().subspan(offset_, limit);
    offset_ += next.size();
    return next;
  }

 private:
  absl::Span<const absl::Span<const uint8_t>> pieces_;
  size_t offset_ = 0;  // in the first of them
};

absl::Status CheckSize(absl::Span<const absl::Span<const uint8_t>> pieces, size_t due) {
  size_t size = 0;
  for (const auto& piece : pieces) size += piece.size();
  if (size == due) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(size, " bytes of KV; the blocks have ", due));
}

class PagedDecoder final : public Decoder {
 public:
  explicit PagedDecoder(const DecoderOptions& options)
      : block_tokens_(options.block_tokens),
        order_(options.order),
        num_pool_blocks_(kernels::CeilDiv(options.pool_tokens, options.block_tokens)) {}

  absl::Status Load(const DecoderOptions& options);

  const ModelConfig& config() const override { return config_; }
  const std::string& fingerprint() const override { return weights_.fingerprint; }
  const std::vector<std::string>& unused_tensors() const override {
    return weights_.unused_tensors;
  }
  const std::string& device_name() const override { return device_->traits().name; }
  kernels::DType kv_dtype() const override { return device_->traits().compute_dtype; }
  int64_t num_pool_blocks() const override { return num_pool_blocks_; }
  size_t block_bytes() const override {
    return block_elements() * kernels::SizeOf(device_->traits().compute_dtype);
  }

  absl::Status StoreBlocks(int layer, bool is_value, absl::Span<const int32_t> pool_blocks,
                           int first_head, int num_heads,
                           absl::Span<const absl::Span<const uint8_t>> data) override;
  absl::StatusOr<std::vector<float>> Step(uint32_t token, int64_t position, int64_t rope_tokens,
                                          absl::Span<const int32_t> block_table) override;

 private:
  struct LayerPool {
    DeviceBuffer k, v;  // [num_pool_blocks, one block]
  };

  int64_t block_elements() const {
    return int64_t{block_tokens_} * config_.num_kv_heads * config_.head_dim;
  }
  // These are the strides within a block, in elements.
  int64_t head_stride() const {
    return order_ == kernels::KvOrder::kNhd ? config_.head_dim
                                            : int64_t{block_tokens_} * config_.head_dim;
  }
  int64_t token_stride() const {
    return order_ == kernels::KvOrder::kNhd ? int64_t{config_.num_kv_heads} * config_.head_dim
                                            : config_.head_dim;
  }
  absl::Status CheckBlocks(absl::Span<const int32_t> pool_blocks) const;
  absl::Status Attend(const LayerPool& pool, int64_t num_keys, void* queries);

  const int block_tokens_;
  const kernels::KvOrder order_;
  const int64_t num_pool_blocks_;
  ModelConfig config_;
  std::unique_ptr<Device> device_;
  Weights weights_;
  std::vector<LayerPool> pools_;  // [num_layers]; blocks are guarded by their owners
  DeviceBuffer block_table_;      // [num_pool_blocks]
  DeviceBuffer scratch_;

  absl::Mutex step_mu_;
  std::unique_ptr<LayerStep> step_ ABSL_PT_GUARDED_BY(step_mu_);
  HiddenStates states_ ABSL_GUARDED_BY(step_mu_);  // of one token
};

absl::Status PagedDecoder::Load(const DecoderOptions& options) {
  absl::StatusOr<ModelConfig> config =
      LoadModelConfig(options.checkpoint_dir, options.overruled_config_keys);
  if (!config.ok()) return config.status();
  config_ = *std::move(config);
  absl::StatusOr<std::unique_ptr<Device>> device =
      CreateDevice(options.device, options.cpu_threads);
  if (!device.ok()) return device.status();
  device_ = *std::move(device);
  absl::StatusOr<Weights> weights = LoadWeights(options.checkpoint_dir, config_, *device_);
  if (!weights.ok()) return weights.status();
  weights_ = *std::move(weights);
  PREFILLD_ASSIGN_OR_RETURN(step_, LayerStep::Create(device_.get(), &config_, &weights_,
                                                     /*max_tokens=*/1, /*tile_tokens=*/1));
  {
    absl::MutexLock lock(&step_mu_);
    PREFILLD_ASSIGN_OR_RETURN(states_, HiddenStates::Create(device_.get(), config_,
                                                            /*max_tokens=*/1,
                                                            /*max_batch_tokens=*/0));
  }

  const auto allocate = [&](DeviceBuffer& buffer, size_t bytes) {
    absl::StatusOr<DeviceBuffer> allocated = device_->Allocate(bytes);
    if (allocated.ok()) buffer = *std::move(allocated);
    return allocated.status();
  };
  absl::Status status = allocate(block_table_, num_pool_blocks_ * sizeof(int32_t));
  if (!status.ok()) return status;
  status = allocate(scratch_, sizeof(float) * kernels::PagedAttentionScratchFloats(
                                                  config_.num_heads, config_.head_dim));
  if (!status.ok()) return status;
  pools_.resize(config_.num_layers);
  for (LayerPool& pool : pools_) {
    if (status = allocate(pool.k, num_pool_blocks_ * block_bytes()); !status.ok()) return status;
    if (status = allocate(pool.v, num_pool_blocks_ * block_bytes()); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status PagedDecoder::CheckBlocks(absl::Span<const int32_t> pool_blocks) const {
  for (int32_t block : pool_blocks) {
    if (block >= 0 && block < num_pool_blocks_) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("pool block ", block, " is outside the pool of ", num_pool_blocks_));
  }
  return absl::OkStatus();
}

absl::Status PagedDecoder::StoreBlocks(int layer, bool is_value,
                                       absl::Span<const int32_t> pool_blocks, int first_head,
                                       int num_heads,
                                       absl::Span<const absl::Span<const uint8_t>> data) {
  if (layer < 0 || layer >= config_.num_layers) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer ", layer, " is outside the model's ", config_.num_layers));
  }
  if (first_head < 0 || num_heads < 1 || num_heads > config_.num_kv_heads - first_head) {
    return absl::InvalidArgumentError(absl::StrCat("heads [", first_head, ", +", num_heads,
                                                   ") are outside the model's ",
                                                   config_.num_kv_heads, " KV heads"));
  }
  if (absl::Status status = CheckBlocks(pool_blocks); !status.ok()) return status;

  // Copies runs that are contiguous on both sides. If all heads come, a run is one or more
  // neighbouring pool blocks; otherwise it is the heads of a block (HND) or of a token (NHD).
  const bool all_heads = num_heads == config_.num_kv_heads;
  const int64_t runs_per_block = !all_heads && order_ == kernels::KvOrder::kNhd ? block_tokens_ : 1;
  const size_t element = kernels::SizeOf(kv_dtype());
  const size_t run_bytes = block_tokens_ / runs_per_block * num_heads * config_.head_dim * element;
  const DeviceBuffer& buffer = is_value ? pools_[layer].v : pools_[layer].k;
  PREFILLD_RETURN_IF_ERROR(CheckSize(data, pool_blocks.size() * runs_per_block * run_bytes));
  PieceReader source(data);
  size_t neighbours = 1;
  for (size_t i = 0; i < pool_blocks.size(); i += neighbours) {
    neighbours = 1;
    while (all_heads && i + neighbours < pool_blocks.size() &&
           pool_blocks[i + neighbours] == pool_blocks[i] + static_cast<int32_t>(neighbours)) {
      ++neighbours;
    }
    char* block = buffer.as<char>() + pool_blocks[i] * block_bytes();
    for (int64_t run = 0; run < runs_per_block; ++run) {
      const int64_t offset = run * token_stride() + first_head * head_stride();
      char* place = block + offset * element;
      for (size_t left = run_bytes * neighbours; left > 0;) {
        const absl::Span<const uint8_t> piece = source.Next(left);
        PREFILLD_RETURN_IF_ERROR(device_->Upload(place, piece.data(), piece.size()));
        place += piece.size();
        left -= piece.size();
      }
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> PagedDecoder::Step(uint32_t token, int64_t position,
                                                      int64_t rope_tokens,
                                                      absl::Span<const int32_t> block_table) {
  if (token >= config_.vocab_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("token ", token, " is outside the vocabulary of ", config_.vocab_size));
  }
  const int64_t blocks = static_cast<int64_t>(block_table.size());
  if (position < 0 || position >= blocks * block_tokens_ || blocks > num_pool_blocks_) {
    return absl::InvalidArgumentError(absl::StrCat("position ", position, " with a table of ",
                                                   blocks, " blocks of ", block_tokens_,
                                                   " tokens, pool of ", num_pool_blocks_));
  }
  if (absl::Status status = CheckBlocks(block_table); !status.ok()) return status;

  absl::MutexLock lock(&step_mu_);
  absl::Status status =
      device_->Upload(block_table_.data(), block_table.data(), blocks * sizeof(int32_t));
  if (status.ok()) status = step_->Embed(states_, {&token, 1}, position, rope_tokens);
  const int64_t slot = block_table[position / block_tokens_] * block_elements() +
                       position % block_tokens_ * token_stride();
  const int64_t slot_bytes = slot * static_cast<int64_t>(kernels::SizeOf(kv_dtype()));
  for (int layer = 0; layer < config_.num_layers && status.ok(); ++layer) {
    const LayerPool& pool = pools_[layer];
    status = step_->BeforeAttention(states_, layer,
                                    {.k = pool.k.as<char>() + slot_bytes,
                                     .v = pool.v.as<char>() + slot_bytes,
                                     .head_stride = head_stride(),
                                     .token_stride = token_stride()});
    if (status.ok()) status = Attend(pool, position + 1, step_->queries());
    if (status.ok()) status = step_->AfterAttention(states_, layer);
  }
  if (!status.ok()) return status;
  absl::StatusOr<std::vector<std::vector<float>>> logits = step_->Logits(states_);
  if (!logits.ok()) return logits.status();
  return std::move(logits->front());
}

absl::Status PagedDecoder::Attend(const LayerPool& pool, int64_t num_keys, void* queries) {
  return device_->ops().PagedAttention(
      {.q = queries,
       .k_pool = pool.k.data(),
       .v_pool = pool.v.data(),
       .block_table = block_table_.as<int32_t>(),
       .out = queries,
       .num_keys = num_keys,
       .block_stride = block_elements(),
       .head_stride = head_stride(),
       .token_stride = token_stride(),
       .num_heads = config_.num_heads,
       .num_kv_heads = config_.num_kv_heads,
       .head_dim = config_.head_dim,
       .block_tokens = block_tokens_,
       .scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim)),
       .scratch = scratch_.as<float>()});
}

}  // namespace

absl::StatusOr<std::unique_ptr<Decoder>> Decoder::Create(const DecoderOptions& options) {
  const int block_tokens = options.block_tokens;
  if (block_tokens != 16 && block_tokens != 32 && block_tokens != 64 && block_tokens != 128) {
    return absl::InvalidArgumentError(
        absl::StrCat("block_tokens ", block_tokens, " unsupported; built for 16, 32, 64, 128"));
  }
  if (kernels::IsInterleaved(options.order)) {
    return absl::InvalidArgumentError(
        "order has K and V in one block; this decoder has a pool for each, in NHD or HND order");
  }
  if (options.pool_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("pool_tokens ", options.pool_tokens, " is below 1"));
  }
  auto decoder = std::make_unique<PagedDecoder>(options);
  if (absl::Status status = decoder->Load(options); !status.ok()) return status;
  return decoder;
}

}  // namespace prefilld::model
