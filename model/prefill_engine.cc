#include "model/prefill_engine.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "model/baseline_attention.h"
#include "model/head_clusters.h"
#include "model/kv_slots.h"
#include "model/layer_step.h"
#include "model/packed_prompts.h"
#include "model/pattern_sharing.h"
#include "model/stopwatch.h"
#include "model/weights.h"

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
// KV heads start at multiples of this many tokens, so that a kernel may load whole tiles.
constexpr int64_t kKvStrideTokens = 128;

// Points on the device's time line, of a dense layer.
enum Mark { kDenseBegins, kDenseDone };

int64_t RoundUp(int64_t n, int64_t multiple) { return kernels::CeilDiv(n, multiple) * multiple; }

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

// What a running sequence uses. Everything is allocated when the engine is created.
struct EngineParts {
  int block_tokens = 0;
  int64_t max_batch_tokens = 0;
  EngineInfo info;
  std::unique_ptr<Backend> backend;  // before all that lives in its memory
  Weights weights;
  HeadClusters clusters;
  std::unique_ptr<LayerStep> step;
  std::unique_ptr<PatternSharing> sharing;
  std::unique_ptr<BaselineAttention> baseline;  // null: not asked for
  std::unique_ptr<KvSlots> slots;
  DeviceBuffer batch_pattern;                 // of the largest batch
  std::vector<kernels::HeadWork> dense_work;  // all heads
  std::vector<kernels::HeadWork> batch_work;  // all heads, by batch_pattern
  std::atomic<bool> busy = false;             // a sequence exists
};

class Sequence final : public PrefillSequence {
 public:
  // `options` with the policy resolved, dense for several prompts. Clears parts->busy on
  // destruction.
  Sequence(EngineParts* parts, PackedPrompts prompts, const AttentionOptions& options)
      : parts_(*parts), prompts_(std::move(prompts)), policy_(options.policy) {
    if (IsBaseline(policy_)) {
      parts_.baseline->StartPrompt(num_tokens(), options);
    } else if (policy_ != AttentionPolicy::kDense) {
      parts_.sharing->StartPrompt(num_tokens(), options);
    }
  }

  ~Sequence() override {
    parts_.slots->ReleaseAll();
    parts_.busy = false;
  }

  AttentionPolicy policy() const override { return policy_; }

  absl::StatusOr<LayerReport> RunLayer() override {
    if (!failure_.ok()) return failure_;
    if (next_layer_ == config().num_layers) {
      return absl::FailedPreconditionError(
          absl::StrCat("all ", next_layer_, " layers are computed"));
    }
    absl::StatusOr<KvSlot> slot = parts_.slots->Acquire(next_layer_);
    if (!slot.ok()) return slot.status();
    Stopwatch stopwatch;
    LayerReport report;
    report.layer = next_layer_;
    failure_ = ComputeLayer(*slot, &report);
    if (!failure_.ok()) return failure_;
    report.compute_us = stopwatch.LapUs();
    parts_.slots->MarkComputed(next_layer_++);
    return report;
  }

  absl::Status PackKv(int layer, const KvSelection& selection, void* dst) override {
    absl::StatusOr<KvSlot> slot = parts_.slots->Computed(layer);
    if (!slot.ok()) return slot.status();
    if (absl::Status status = CheckSelection(selection); !status.ok()) return status;
    const PromptPlace& place = prompts_.places()[selection.prompt];
    const int64_t first_byte = place.first * config().head_dim *
                               static_cast<int64_t>(kernels::SizeOf(parts_.info.native_dtype));
    return parts_.backend->PackKv({.k = static_cast<const char*>(slot->k) + first_byte,
                                   .v = static_cast<const char*>(slot->v) + first_byte,
                                   .kv_head_stride = kv_head_stride(),
                                   .num_tokens = place.count,
                                   .first_block = selection.first_block,
                                   .num_blocks = selection.num_blocks,
                                   .block_tokens = selection.block_tokens,
                                   .first_head = selection.first_head,
                                   .num_heads = selection.num_heads,
                                   .head_dim = config().head_dim,
                                   .order = selection.order,
                                   .dst_dtype = selection.dtype,
                                   .dst = dst});
  }

  void ReleaseKv(int layer) override { parts_.slots->Release(layer); }

  absl::StatusOr<std::vector<std::vector<float>>> FinalLogits() override {
    if (absl::Status status = CheckFinished(); !status.ok()) return status;
    return parts_.step->Logits();
  }

  absl::StatusOr<PromptLogprobs> Logprobs(int prompt, absl::FunctionRef<bool()> go_on) override {
    if (absl::Status status = CheckFinished(); !status.ok()) return status;
    if (absl::Status status = CheckPrompt(prompt); !status.ok()) return status;
    return parts_.step->LogprobsOf(prompt, prompts_.tokens_of(prompt), go_on);
  }

 private:
  const ModelConfig& config() const { return parts_.info.config; }
  bool is_batch() const { return prompts_.count() > 1; }
  // Of all prompts, padding between them included.
  int64_t num_tokens() const { return static_cast<int64_t>(prompts_.tokens().size()); }
  int64_t kv_head_stride() const {
    return RoundUp(num_tokens(), kKvStrideTokens) * config().head_dim;
  }

  absl::Status Begin() {
    // One rotation fits all prompts of a batch.
    absl::Status status = parts_.step->Embed(prompts_, prompts_.places().front().count);
    if (!status.ok() || !is_batch()) return status;
    const std::vector<uint32_t> pattern = prompts_.Pattern(parts_.block_tokens);
    return parts_.backend->Upload(parts_.batch_pattern.data(), pattern.data(),
                                  pattern.size() * sizeof(uint32_t));
  }

  // Waits for the device at the end, as PackKv asks for, and nowhere else but for decisions about
  // patterns: what the stages took is known from marks on the device's time line.
  absl::Status ComputeLayer(const KvSlot& slot, LayerReport* report) {
    absl::Status status;
    if (next_layer_ == 0) status = Begin();
    if (status.ok()) {
      status = parts_.step->BeforeAttention(next_layer_, {.k = slot.k,
                                                          .v = slot.v,
                                                          .head_stride = kv_head_stride(),
                                                          .token_stride = config().head_dim});
    }
    if (status.ok()) status = Attend(slot, report);
    if (status.ok()) status = parts_.step->AfterAttention(next_layer_);
    if (status.ok()) status = parts_.backend->Synchronize();
    if (status.ok()) status = ReportAttention(report);
    return status;
  }

  absl::Status Attend(const KvSlot& slot, LayerReport* report) {
    kernels::AttentionParams attention = {
        .q = parts_.step->queries(),
        .k = slot.k,
        .v = slot.v,
        .out = parts_.step->queries(),
        .num_queries = num_tokens(),
        .num_keys = num_tokens(),
        .kv_head_stride = kv_head_stride(),
        .num_heads = config().num_heads,
        .num_kv_heads = config().num_kv_heads,
        .head_dim = config().head_dim,
        .block_tokens = parts_.block_tokens,
        .scale = 1.0f / std::sqrt(static_cast<float>(config().head_dim)),
    };
    if (IsBaseline(policy_)) {
      // Takes its times by the host's clock.
      absl::Status status = parts_.backend->Synchronize();
      return status.ok() ? parts_.baseline->Attend(next_layer_, attention, report) : status;
    }
    if (policy_ != AttentionPolicy::kDense) {
      return parts_.sharing->Attend(next_layer_, attention, report);
    }
    const auto& work = is_batch() ? parts_.batch_work : parts_.dense_work;
    attention.work = work.data();
    attention.num_work = static_cast<int>(work.size());
    absl::Status status = parts_.backend->Mark(kDenseBegins);
    if (status.ok()) status = parts_.backend->Attention(attention);
    if (status.ok()) status = parts_.backend->Mark(kDenseDone);
    return status;
  }

  absl::Status ReportAttention(LayerReport* report) {
    if (IsBaseline(policy_)) return absl::OkStatus();
    if (policy_ != AttentionPolicy::kDense) return parts_.sharing->Report(report);
    const absl::StatusOr<double> us = parts_.backend->ElapsedUs(kDenseBegins, kDenseDone);
    if (!us.ok()) return us.status();
    report->attention_us = static_cast<int64_t>(*us);
    report->dense_heads = config().num_heads;
    report->density = 1.0;
    return absl::OkStatus();
  }

  absl::Status CheckFinished() const {
    if (next_layer_ == config().num_layers) return absl::OkStatus();
    return absl::FailedPreconditionError(absl::StrCat("logits asked for after ", next_layer_,
                                                      " of ", config().num_layers, " layers"));
  }

  absl::Status CheckPrompt(int prompt) const {
    if (prompt >= 0 && prompt < prompts_.count()) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("prompt ", prompt, " is outside the batch of ", prompts_.count()));
  }

  absl::Status CheckSelection(const KvSelection& selection) const {
    if (absl::Status status = CheckPrompt(selection.prompt); !status.ok()) return status;
    const int block_tokens = selection.block_tokens;
    if (block_tokens != 16 && block_tokens != 32 && block_tokens != 64 && block_tokens != 128) {
      return absl::InvalidArgumentError(absl::StrCat("kv.block_tokens ", block_tokens,
                                                     " unsupported; built for 16, 32, 64, 128"));
    }
    const int64_t blocks =
        kernels::CeilDiv(prompts_.places()[selection.prompt].count, block_tokens);
    if (selection.first_block < 0 || selection.num_blocks < 1 ||
        selection.num_blocks > blocks - selection.first_block) {
      return absl::InvalidArgumentError(absl::StrCat("kv.first_block ", selection.first_block,
                                                     " and kv.num_blocks ", selection.num_blocks,
                                                     " do not lie within the prompt's ", blocks));
    }
    if (selection.first_head < 0 || selection.num_heads < 1 ||
        selection.num_heads > config().num_kv_heads - selection.first_head) {
      return absl::InvalidArgumentError(absl::StrCat(
          "kv.first_head ", selection.first_head, " and kv.num_heads ", selection.num_heads,
          " do not lie within the model's ", config().num_kv_heads));
    }
    return absl::OkStatus();
  }

  EngineParts& parts_;
  const PackedPrompts prompts_;
  const AttentionPolicy policy_;
  int next_layer_ = 0;
  absl::Status failure_;  // of a layer: the hidden states are lost with it
};

class Engine final : public PrefillEngine {
 public:
  explicit Engine(std::unique_ptr<EngineParts> parts) : parts_(std::move(parts)) {}

  const EngineInfo& info() const override { return parts_->info; }
  int kv_slots() const override { return parts_->slots->count(); }
  size_t allocated_bytes() const override { return parts_->backend->allocated_bytes(); }
  absl::StatusOr<DeviceBuffer> AllocateStaging(size_t bytes) override {
    return parts_->backend->AllocateStaging(bytes);
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
    for (const PromptInput& prompt : prompts) {
      if (absl::Status status = CheckPrompt(prompt); !status.ok()) return status;
      tokens.push_back(prompt.tokens);
    }
    if (absl::Status status = CheckBatch(prompts); !status.ok()) return status;
    if (parts_->busy.exchange(true)) {
      return absl::FailedPreconditionError("another sequence is running");
    }
    AttentionOptions resolved = prompts.front().attention;
    resolved.policy = Resolve(resolved, static_cast<int64_t>(tokens.front().size()));
    return std::make_unique<Sequence>(parts_.get(), PackedPrompts(tokens), resolved);
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

AttentionOptions DefaultAttention(const EngineOptions& options, const HeadClusters& clusters) {
  AttentionOverrides of_file;
  of_file.gamma = clusters.gamma;
  of_file.vertical_slash_gamma = clusters.vertical_slash_gamma;
  of_file.tau = clusters.tau;
  of_file.delta = clusters.delta;
  of_file.coverage = clusters.coverage;
  of_file.min_budget_tokens = clusters.min_budget_tokens;
  return Apply(options.attention_overrides, Apply(of_file, options.attention));
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
  auto pattern =
      parts->backend->Allocate(blocks * kernels::PatternWords(blocks) * sizeof(uint32_t));
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
  Backend* backend = parts->backend.get();
  const int64_t max_tokens = parts->info.max_tokens;  // of one prompt
  const int64_t all_tokens = std::max(max_tokens, parts->max_batch_tokens);
  int64_t tile_tokens = options.tile_tokens;
  if (tile_tokens == 0) {
    tile_tokens = parts->info.device_name == "cpu" ? kCpuTileTokens : kCudaTileTokens;
  }
  auto step = LayerStep::Create(backend, &config, &parts->weights, all_tokens, tile_tokens,
                                parts->max_batch_tokens);
  if (!step.ok()) return step.status();
  auto sharing =
      PatternSharing::Create(backend, &config, &parts->clusters, max_tokens, options.block_tokens);
  if (!sharing.ok()) return sharing.status();
  if (options.baselines) {
    auto baseline = BaselineAttention::Create(backend, &config, max_tokens, options.block_tokens);
    if (!baseline.ok()) return baseline.status();
    parts->baseline = *std::move(baseline);
  }
  const int64_t slot_elements =
      RoundUp(all_tokens, kKvStrideTokens) * config.num_kv_heads * config.head_dim;
  auto slots = KvSlots::Create(backend, options.kv_slots,
                               slot_elements * kernels::SizeOf(backend->compute_dtype()));
  if (!slots.ok()) return slots.status();
  // Heads become pivots, of which block mass is asked, where there are clusters.
  absl::Status status = backend->ReserveAttention({.num_queries = all_tokens,
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
  info.default_attention = DefaultAttention(options, parts->clusters);
  if (absl::Status status = Validate(info.default_attention); !status.ok()) return status;

  absl::StatusOr<std::unique_ptr<Backend>> backend =
      CreateBackend(options.device, options.cpu_threads);
  if (!backend.ok()) return backend.status();
  parts->backend = *std::move(backend);
  info.device_name = parts->backend->device_name();
  info.native_dtype = parts->backend->compute_dtype();

  absl::StatusOr<Weights> weights =
      LoadWeights(options.checkpoint_dir, info.config, *parts->backend);
  if (!weights.ok()) return weights.status();
  parts->weights = *std::move(weights);
  info.fingerprint = parts->weights.fingerprint;
  if (absl::Status status = CheckMadeFor(parts->clusters, info.fingerprint); !status.ok()) {
    return status;
  }

  for (int head = 0; head < info.config.num_heads; ++head) {
    parts->dense_work.push_back({.head = head});
  }
  const bool is_cpu = info.device_name == "cpu";
  parts->max_batch_tokens = options.max_batch_tokens.value_or(is_cpu ? 0 : kCudaBatchTokens);
  if (absl::Status status = AllocateWorkspace(options, parts.get()); !status.ok()) return status;
  return std::make_unique<Engine>(std::move(parts));
}

}  // namespace prefilld::model
