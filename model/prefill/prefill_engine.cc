#include "model/prefill/prefill_engine.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "model/prefill/engine_parts.h"
#include "model/prefill/packed_prompts.h"
#include "model/prefill/prompt_sequence.h"

namespace prefilld::model {
namespace {

constexpr int64_t kDefaultMaxTokens = 131072;
// Far above any device's memory, and low enough that kernels may count positions as int and no size
// of the workspace overflows.
constexpr int64_t kMaxPositions = int64_t{1} << 28;
// Wide enough to saturate the GEMMs of the device, narrow enough that the wide activations stay
// small beside the hidden states (CUDA) or in the cache (CPU).
constexpr int64_t kCpuTileTokens = 512;
constexpr int64_t kCudaTileTokens = 8192;
// Prompts of up to 256 tokens, which gain by it; see kFullBatchPrompts.
constexpr int64_t kCudaBatchTokens = 2048;
// Where a layer is so short that the gap to the next one shows; and one that is computed in vain,
// for a prompt that ends meanwhile, costs little.
constexpr int64_t kCudaRunAheadTokens = 8192;
constexpr int64_t kCudaGraphTokens = 2048;

absl::Status ValidateOptions(const EngineOptions& options) {
  if (options.max_tokens < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_tokens ", options.max_tokens, " is negative"));
  }
  if (options.tile_tokens < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("tile_tokens ", options.tile_tokens, " is negative"));
  }
  if (options.max_batch_tokens &&
      (*options.max_batch_tokens < 0 || *options.max_batch_tokens > kMaxBatchTokens)) {
    return absl::InvalidArgumentError(absl::StrCat("max_batch_tokens ", *options.max_batch_tokens,
                                                   " is outside 0 to ", kMaxBatchTokens));
  }
  if (options.max_graph_tokens &&
      (*options.max_graph_tokens < 0 || *options.max_graph_tokens > kMaxGraphTokens)) {
    return absl::InvalidArgumentError(absl::StrCat("max_graph_tokens ", *options.max_graph_tokens,
                                                   " is outside 0 to ", kMaxGraphTokens));
  }
  if (options.kv_slots < 2) {
    return absl::InvalidArgumentError(absl::StrCat("kv_slots ", options.kv_slots,
                                                   " is below 2: one layer leaves while the next "
                                                   "is computed"));
  }
  if (options.block_tokens != 64 && options.block_tokens != 128) {
    return absl::InvalidArgumentError(
        absl::StrCat("block_tokens ", options.block_tokens, " unsupported; built for 64, 128"));
  }
  return absl::OkStatus();
}

class Engine final : public PrefillEngine {
 public:
  explicit Engine(std::unique_ptr<EngineParts> parts) : parts_(std::move(parts)) {}

  const EngineInfo& info() const override { return parts_->info; }
  int kv_slots() const override { return parts_->slots->count(); }
  size_t allocated_bytes() const override { return parts_->device->allocated_bytes(); }
  int64_t num_recordings() const override { return parts_->device->num_recordings(); }
  absl::StatusOr<DeviceBuffer> AllocateStaging(size_t bytes) override {
    return parts_->device->AllocateStaging(bytes);
  }

  int64_t max_batch_tokens() const override { return parts_->max_batch_tokens; }
  int64_t BatchTokens(int64_t num_tokens, const AttentionOptions& options) const override {
    const int64_t padded = PackedPrompts::PaddedTokens(num_tokens);
    const bool fits = kFullBatchPrompts * padded <= parts_->max_batch_tokens &&
                      Resolve(options, num_tokens) == AttentionPolicy::kDense &&
                      HasCommonRopeTable(parts_->info.config, num_tokens);
    return fits ? padded : 0;
  }

  absl::StatusOr<std::unique_ptr<PrefillSequence>> Start(
      absl::Span<const PromptInput> prompts) override {
    std::vector<absl::Span<const uint32_t>> tokens;
    int64_t padded_tokens = 0;
    bool logprobs = false;
    for (const PromptInput& prompt : prompts) {
      if (absl::Status status = CheckPrompt(prompt); !status.ok()) return status;
      tokens.push_back(prompt.tokens);
      padded_tokens += PackedPrompts::PaddedTokens(static_cast<int64_t>(prompt.tokens.size()));
      logprobs |= prompt.logprobs;
    }
    if (absl::Status status = CheckBatch(prompts); !status.ok()) return status;
    if (parts_->busy.exchange(true)) {
      return absl::FailedPreconditionError("another sequence is running");
    }
    AttentionOptions resolved = prompts.front().attention;
    resolved.policy = Resolve(resolved, static_cast<int64_t>(tokens.front().size()));
    // Recorded layers come in few lengths.
    const bool pad_last =
        resolved.policy == AttentionPolicy::kDense && padded_tokens <= parts_->max_graph_tokens;
    return std::make_unique<PromptSequence>(parts_.get(), PackedPrompts(tokens, pad_last), resolved,
                                            logprobs);
  }

 private:
  AttentionPolicy Resolve(const AttentionOptions& options, int64_t num_tokens) const {
    return ResolvePolicy(options, num_tokens, parts_->block_tokens, !parts_->clusters.empty());
  }

  absl::Status CheckPrompt(const PromptInput& prompt) const {
    if (absl::Status status = CheckTokens(prompt.tokens); !status.ok()) return status;
    if (absl::Status status = Validate(prompt.attention); !status.ok()) return status;
    if (!IsBaseline(prompt.attention.policy) || parts_->baseline != nullptr) {
      return absl::OkStatus();
    }
    return absl::InvalidArgumentError(absl::StrCat("attention.policy ",
                                                   Name(prompt.attention.policy),
                                                   " is a baseline; this engine has none"));
  }

  absl::Status CheckBatch(absl::Span<const PromptInput> prompts) const {
    if (prompts.empty()) return absl::InvalidArgumentError("a batch of no prompts");
    if (prompts.size() == 1) return absl::OkStatus();
    int64_t sum = 0;
    for (const PromptInput& prompt : prompts) {
      const auto num_tokens = static_cast<int64_t>(prompt.tokens.size());
      const int64_t taken = BatchTokens(num_tokens, prompt.attention);
      if (taken == 0) {
        return absl::InvalidArgumentError(
            absl::StrCat("a prompt of ", num_tokens, " tokens with attention.policy ",
                         Name(prompt.attention.policy), " runs alone, not in a batch"));
      }
      sum += taken;
    }
    if (sum <= parts_->max_batch_tokens) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("a batch of ", sum, " tokens; at most ",
                                                   parts_->max_batch_tokens, ", padding included"));
  }

  absl::Status CheckTokens(absl::Span<const uint32_t> tokens) const {
    const int64_t vocab_size = parts_->info.config.vocab_size;
    if (tokens.empty() || static_cast<int64_t>(tokens.size()) > parts_->info.max_tokens) {
      return absl::InvalidArgumentError(absl::StrCat(
          "a prompt of ", tokens.size(), " tokens is outside [1, ", parts_->info.max_tokens, "]"));
    }
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i] < vocab_size) continue;
      return absl::InvalidArgumentError(absl::StrCat("token_ids[", i, "] ", tokens[i],
                                                     " is outside the vocabulary of ", vocab_size));
    }
    return absl::OkStatus();
  }

  const std::unique_ptr<EngineParts> parts_;
};

// The model's last path component, for people.
std::string ModelName(const std::string& checkpoint_dir) {
  const std::filesystem::path path = std::filesystem::path(checkpoint_dir).lexically_normal();
  return (path.has_filename() ? path.filename() : path.parent_path().filename()).string();
}

absl::StatusOr<HeadClusters> LoadClusters(const EngineOptions& options, const ModelConfig& config) {
  if (!options.clusters_path.empty()) return LoadHeadClusters(options.clusters_path, config);
  const std::string beside = options.checkpoint_dir + "/head_clusters.json";
  std::error_code ignored;
  if (std::filesystem::exists(beside, ignored)) return LoadHeadClusters(beside, config);
  HeadClusters none;
  none.cluster_of.assign(config.num_layers,
                         std::vector<int>(config.num_heads, HeadClusters::kNoCluster));
  return none;
}

absl::StatusOr<int64_t> MaxTokens(const EngineOptions& options, const ModelConfig& config) {
  if (options.max_tokens == 0) return std::min(config.max_positions, kDefaultMaxTokens);
  const int64_t limit = std::min(PositionLimit(config), kMaxPositions);
  if (options.max_tokens <= limit) return options.max_tokens;
  return absl::InvalidArgumentError(absl::StrCat("max_tokens ", options.max_tokens,
                                                 " is above the model's ", limit, " positions"));
}

// Every head looks at one pattern, which is uploaded with each batch.
absl::Status AllocateBatchPattern(EngineParts* parts) {
  if (parts->max_batch_tokens == 0) return absl::OkStatus();
  const int64_t blocks = kernels::CeilDiv(parts->max_batch_tokens, parts->block_tokens);
  auto pattern = parts->device->Allocate(blocks * kernels::PatternWords(blocks) * sizeof(uint32_t));
  if (!pattern.ok()) return pattern.status();
  parts->batch_pattern = *std::move(pattern);
  for (kernels::HeadWork work : parts->dense_work) {
    work.pattern = parts->batch_pattern.as<uint32_t>();
    parts->batch_work.push_back(work);
  }
  return absl::OkStatus();
}

// The device memory of a running sequence.
absl::Status AllocateWorkspace(const EngineOptions& options, EngineParts* parts) {
  const ModelConfig& config = parts->info.config;
  Device* device = parts->device.get();
  const int64_t max_tokens = parts->info.max_tokens;  // of one prompt
  int64_t all_tokens = std::max(max_tokens, parts->max_batch_tokens);
  if (parts->max_graph_tokens > 0) all_tokens = PackedPrompts::PaddedTokens(all_tokens);
  int64_t tile_tokens = options.tile_tokens;
  if (tile_tokens == 0) {
    tile_tokens = device->traits().asynchronous ? kCudaTileTokens : kCpuTileTokens;
  }
  auto step = LayerStep::Create(device, &config, &parts->weights, all_tokens, tile_tokens,
                                parts->max_batch_tokens);
  if (!step.ok()) return step.status();
  auto sharing =
      PatternSharing::Create(device, &config, &parts->clusters, max_tokens, options.block_tokens);
  if (!sharing.ok()) return sharing.status();
  if (options.baselines) {
    auto baseline = BaselineAttention::Create(device, &config, max_tokens, options.block_tokens);
    if (!baseline.ok()) return baseline.status();
    parts->baseline = *std::move(baseline);
  }
  const int64_t slot_elements =
      RoundUp(all_tokens, kKvStrideTokens) * config.num_kv_heads * config.head_dim;
  auto slots = KvSlots::Create(device, options.kv_slots,
                               slot_elements * kernels::SizeOf(device->traits().compute_dtype));
  if (!slots.ok()) return slots.status();
  // Heads become pivots, of which block mass is asked, where there are clusters.
  absl::Status status =
      device->ops().ReserveAttention({.num_queries = all_tokens,
                                      .num_keys = all_tokens,
                                      .kv_head_stride = all_tokens * config.head_dim,
                                      .num_heads = config.num_heads,
                                      .num_kv_heads = config.num_kv_heads,
                                      .head_dim = config.head_dim,
                                      .block_tokens = options.block_tokens},
                                     /*block_mass=*/!parts->clusters.empty());
  if (!status.ok()) return status;
  if (status = (*step)->TuneLinears(); !status.ok()) return status;
  parts->step = *std::move(step);
  parts->sharing = *std::move(sharing);
  parts->slots = *std::move(slots);
  return AllocateBatchPattern(parts);
}

}  // namespace

absl::StatusOr<std::unique_ptr<PrefillEngine>> CreatePrefillEngine(const EngineOptions& options) {
  if (absl::Status status = ValidateOptions(options); !status.ok()) return status;
  auto parts = std::make_unique<EngineParts>();
  EngineInfo& info = parts->info;
  parts->block_tokens = options.block_tokens;

  absl::StatusOr<ModelConfig> config = LoadModelConfig(options.checkpoint_dir);
  if (!config.ok()) return config.status();
  info.config = *std::move(config);
  absl::StatusOr<int64_t> max_tokens = MaxTokens(options, info.config);
  if (!max_tokens.ok()) return max_tokens.status();
  info.max_tokens = *max_tokens;
  info.model_name = ModelName(options.checkpoint_dir);

  absl::StatusOr<HeadClusters> clusters = LoadClusters(options, info.config);
  if (!clusters.ok()) return clusters.status();
  parts->clusters = *std::move(clusters);
  info.default_attention =
      Apply(options.attention_overrides, Apply(parts->clusters.thresholds, AttentionOptions()));
  if (absl::Status status = Validate(info.default_attention); !status.ok()) return status;

  absl::StatusOr<std::unique_ptr<Device>> device =
      CreateDevice(options.device, options.cpu_threads);
  if (!device.ok()) return device.status();
  parts->device = *std::move(device);
  info.device_name = parts->device->traits().name;
  info.native_dtype = parts->device->traits().compute_dtype;

  absl::StatusOr<Weights> weights =
      LoadWeights(options.checkpoint_dir, info.config, *parts->device);
  if (!weights.ok()) return weights.status();
  parts->weights = *std::move(weights);
  info.fingerprint = parts->weights.fingerprint;
  if (absl::Status status = CheckMadeFor(parts->clusters, info.fingerprint); !status.ok()) {
    return status;
  }

  for (int head = 0; head < info.config.num_heads; ++head) {
    parts->dense_work.push_back({.head = head});
  }
  const bool asynchronous = parts->device->traits().asynchronous;
  parts->max_batch_tokens = options.max_batch_tokens.value_or(asynchronous ? kCudaBatchTokens : 0);
  if (parts->device->traits().records) {
    parts->max_graph_tokens = options.max_graph_tokens.value_or(kCudaGraphTokens);
  }
  if (asynchronous) parts->run_ahead_tokens = kCudaRunAheadTokens;
  if (absl::Status status = AllocateWorkspace(options, parts.get()); !status.ok()) return status;
  return std::make_unique<Engine>(std::move(parts));
}

}  // namespace prefilld::model
