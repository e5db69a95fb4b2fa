#include "model/prefill/engine_parts.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <filesystem>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/device/stopwatch.h"
#include "model/prefill/crossover.h"
#include "model/prefill/packed_prompts.h"
#include "model/prefill/prompt_sequence.h"
#include "proto/status_macros.h"

namespace prefilld::model {
namespace {

constexpr int64_t kDefaultMaxTokens = 131072;
// No device's memory reaches this limit. Below it kernels may count positions as int, and no size
// of the workspace overflows.
constexpr int64_t kMaxPositions = int64_t{1} << 28;
// These tiles are wide enough to saturate the GEMMs of the device, and narrow enough that the wide
// activations stay small beside the hidden states. On a CPU every op of a tile ends at a barrier,
// where threads wait for one that another process keeps from its core: narrower tiles have more.
constexpr int64_t kCpuTileTokens = 2048;
constexpr int64_t kCudaTileTokens = 8192;
// Batches help prompts of up to 256 tokens, and this has room for as many as kFullBatchPrompts of
// them.
constexpr int64_t kCudaBatchTokens = 2048;
// Up to this length the gap between two layers would show. A layer that is computed in vain, for a
// prompt that ends meanwhile, costs little at these lengths.
constexpr int64_t kCudaRunAheadTokens = 8192;
constexpr int64_t kCudaGraphTokens = 2048;
// There are two places for the longest prompts: one is computed while the KV of the other one
// leaves, or while that one waits.
constexpr int kCudaLongPrompts = 2;
constexpr int kCpuLongPrompts = 1;
// There are more places for prompts between the longest and the short ones. Whoever is overtaken
// keeps its place, so with few places two long prompts that wait would hold up all that are too
// long for the other places, and might have gone first.
constexpr int kCudaMiddlePrompts = 2;
constexpr int64_t kCudaMiddleTokens = kDefaultMaxTokens;
// There are more places for short prompts, so that some are computed while the consumers of others
// are slow. They take little memory beside a long prompt, and a long prompt does not have to wait
// for their consumers.
constexpr int kCudaShortPrompts = 4;
constexpr int kCpuShortPrompts = 2;
constexpr int64_t kCudaShortTokens = 8192;
// The workspace of prompts that interject is small beside a long prompt's.
constexpr int64_t kInterjectTokens = 4096;
constexpr int64_t kCudaInterjectTileTokens = 2048;
constexpr int64_t kCpuShortTokens = 4096;
constexpr int kTurnPointsMark = PatternSharing::kNumMarks;  // the first one
constexpr int kPromptStatesMark = kTurnPointsMark + TurnPoints::kNumMarks;
static_assert(kPromptStatesMark + kMaxPromptStates * PromptState::kNumMarks <= Device::kNumMarks);

absl::Status CheckRange(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, " ", value, " is outside ", least, " to ", most));
}

absl::Status ValidateOptions(const EngineOptions& options) {
  if (options.max_tokens < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_tokens ", options.max_tokens, " is negative"));
  }
  if (options.tile_tokens < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("tile_tokens ", options.tile_tokens, " is negative"));
  }
  PREFILLD_RETURN_IF_ERROR(
      CheckRange("max_batch_tokens", options.max_batch_tokens.value_or(0), 0, kMaxBatchTokens));
  PREFILLD_RETURN_IF_ERROR(
      CheckRange("max_graph_tokens", options.max_graph_tokens.value_or(0), 0, kMaxGraphTokens));
  PREFILLD_RETURN_IF_ERROR(CheckRange("most_attention_work", options.most_attention_work, 0,
                                      std::numeric_limits<int64_t>::max()));
  PREFILLD_RETURN_IF_ERROR(CheckRange(
      "interject_tokens", options.interject_tokens.value_or(kInterjectTokens), 1, kMaxPositions));
  const int long_prompts = options.long_prompts.value_or(1);
  PREFILLD_RETURN_IF_ERROR(CheckRange("long_prompts", long_prompts, 1, kMaxPromptStates));
  PREFILLD_RETURN_IF_ERROR(CheckRange("short_prompts", options.short_prompts.value_or(0), 0,
                                      kMaxPromptStates - long_prompts));
  PREFILLD_RETURN_IF_ERROR(CheckRange("max_resident_tokens", options.max_resident_tokens, 0,
                                      kMaxPromptStates * kMaxPositions));
  PREFILLD_RETURN_IF_ERROR(
      CheckRange("prefix_cache_bytes", options.prefix_cache_bytes, 0, kMaxPrefixCacheBytes));
  PREFILLD_RETURN_IF_ERROR(
      CheckRange("prefix_cache_events", options.prefix_cache_events, 0, kMaxPrefixCacheEvents));
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

// Returns the model's last path component, for people.
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

// Allocates the scratch that all prompts use in turns, for `most_tokens` at a time.
absl::Status AllocateWorkspace(const EngineOptions& options, int64_t most_tokens,
                               EngineParts* parts) {
  const ModelConfig& config = parts->info.config;
  const int64_t max_tokens = parts->info.max_tokens;  // of a prompt alone
  Device* device = parts->device.get();
  int64_t tile_tokens = options.tile_tokens;
  if (tile_tokens == 0) {
    tile_tokens = device->traits().asynchronous ? kCudaTileTokens : kCpuTileTokens;
  }
  parts->points =
      std::make_unique<TurnPoints>(device, kTurnPointsMark, options.most_attention_work);
  PREFILLD_ASSIGN_OR_RETURN(
      parts->step, LayerStep::Create(device, &config, &parts->weights, most_tokens, tile_tokens,
                                     parts->points.get()));
  parts->interject_tokens =
      std::min(options.interject_tokens.value_or(kInterjectTokens), most_tokens);
  if (device->traits().asynchronous) tile_tokens = std::min(tile_tokens, kCudaInterjectTileTokens);
  PREFILLD_ASSIGN_OR_RETURN(
      parts->short_step,
      LayerStep::Create(device, &config, &parts->weights, parts->interject_tokens, tile_tokens));
  PREFILLD_ASSIGN_OR_RETURN(parts->sharing,
                            SharingWorkspace::Create(device, &config, &parts->clusters, max_tokens,
                                                     options.block_tokens, parts->points.get()));
  if (options.baselines) {
    PREFILLD_ASSIGN_OR_RETURN(
        parts->baseline,
        BaselineWorkspace::Create(device, &config, max_tokens, options.block_tokens));
  }
  std::vector<int> all_heads(static_cast<size_t>(config.num_heads));
  std::iota(all_heads.begin(), all_heads.end(), 0);
  for (const int stride : {8, 16}) {  // a request may choose, and neither always needs more
    PREFILLD_RETURN_IF_ERROR(
        device->ops().ReserveAntidiagonalScores({.num_queries = max_tokens,
                                                 .num_keys = max_tokens,
                                                 .num_heads = config.num_heads,
                                                 .num_kv_heads = config.num_kv_heads,
                                                 .head_dim = config.head_dim,
                                                 .block_tokens = options.block_tokens,
                                                 .stride = stride,
                                                 .heads = all_heads.data(),
                                                 .num_scored = config.num_heads}));
  }
  // If there are clusters, heads become pivots, and attention is asked for their block mass.
  return device->ops().ReserveAttention({.num_queries = most_tokens,
                                         .num_keys = most_tokens,
                                         .kv_head_stride = most_tokens * config.head_dim,
                                         .num_heads = config.num_heads,
                                         .num_kv_heads = config.num_kv_heads,
                                         .head_dim = config.head_dim,
                                         .block_tokens = options.block_tokens},
                                        /*block_mass=*/!parts->clusters.empty());
}

// Allocates the states of prompts.
class StateAllocator {
 public:
  explicit StateAllocator(EngineParts* parts)
      : device_(*parts->device),
        pool_(parts->states),
        parts_{.device = parts->device.get(),
               .config = &parts->info.config,
               .points = parts->points.get(),
               .sharing = parts->sharing.get(),
               .baseline = parts->baseline.get(),
               .block_tokens = parts->block_tokens,
               .max_prompt_tokens = parts->info.max_tokens,
               .max_batch_tokens = parts->max_batch_tokens,
               .kv_slots = parts->kv_slots} {}

  absl::Status Add(int64_t max_tokens) {
    const int first_mark = kPromptStatesMark + pool_.count() * PromptState::kNumMarks;
    PREFILLD_ASSIGN_OR_RETURN(auto state, PromptState::Create(parts_, max_tokens, first_mark));
    pool_.Add(std::move(state));
    return absl::OkStatus();
  }

  // Adds one only if kMemoryReserve remains free behind it.
  absl::Status AddIfItFits(int64_t max_tokens) {
    const absl::StatusOr<DeviceBuffer> reserve = device_.Allocate(kMemoryReserve);
    absl::Status status = reserve.ok() ? Add(max_tokens) : reserve.status();
    if (!absl::IsResourceExhausted(status)) return status;
    spdlog::info("no place for one more prompt of {} tokens: there is too little memory: {}",
                 max_tokens, std::string(status.message()));
    return absl::OkStatus();
  }

 private:
  Device& device_;
  PromptStatePool& pool_;
  const PromptStateParts parts_;
};

// Adds states that hold so many tokens at most, in all.
absl::Status AddWithin(int64_t max_resident_tokens, int64_t long_tokens, int64_t short_tokens,
                       int short_prompts, StateAllocator& allocator) {
  if (max_resident_tokens < long_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("max_resident_tokens ", max_resident_tokens,
                                                   " is below ", long_tokens,
                                                   ", the longest prompt or batch"));
  }
  for (const int64_t tokens :
       PlacesWithin(max_resident_tokens, long_tokens, short_tokens, short_prompts)) {
    PREFILLD_RETURN_IF_ERROR(allocator.Add(tokens));
  }
  return absl::OkStatus();
}

absl::Status AllocateMemory(const EngineOptions& options, EngineParts* parts) {
  const bool asynchronous = parts->device->traits().asynchronous;
  int64_t long_tokens = parts->info.max_tokens;
  // Prompts whose layers are recorded are padded.
  if (parts->max_graph_tokens > 0) long_tokens = PackedPrompts::PaddedTokens(long_tokens);
  const int64_t short_tokens =
      std::max(parts->max_batch_tokens,
               std::min(long_tokens, asynchronous ? kCudaShortTokens : kCpuShortTokens));
  const int short_prompts =
      options.short_prompts.value_or(std::min(asynchronous ? kCudaShortPrompts : kCpuShortPrompts,
                                              kMaxPromptStates - options.long_prompts.value_or(1)));
  // Batches need a place, too, where there is none for short prompts.
  if (short_prompts == 0) long_tokens = std::max(long_tokens, short_tokens);
  if (options.max_resident_tokens > 0) {
    long_tokens = std::max(long_tokens, parts->max_batch_tokens);
  }
  PREFILLD_RETURN_IF_ERROR(AllocateWorkspace(options, std::max(long_tokens, short_tokens), parts));

  StateAllocator allocator(parts);
  const bool within = options.max_resident_tokens > 0;
  if (within) {
    PREFILLD_RETURN_IF_ERROR(AddWithin(options.max_resident_tokens, long_tokens, short_tokens,
                                       short_prompts, allocator));
  }
  for (int i = 0; i < options.long_prompts.value_or(1) && !within; ++i) {
    PREFILLD_RETURN_IF_ERROR(allocator.Add(long_tokens));
  }
  for (int i = 0; i < short_prompts && !within; ++i) {
    PREFILLD_RETURN_IF_ERROR(allocator.Add(short_tokens));
  }
  for (LayerStep* step : {parts->step.get(), parts->short_step.get()}) {
    PREFILLD_RETURN_IF_ERROR(step->TuneLinears(parts->states.largest().hidden));
  }
  if (options.long_prompts || within) return absl::OkStatus();
  std::vector<int64_t> more(asynchronous ? kCudaLongPrompts - 1 : kCpuLongPrompts - 1, long_tokens);
  more.resize(more.size() + (asynchronous ? kCudaMiddlePrompts : 0),
              std::min(long_tokens, kCudaMiddleTokens));
  for (const int64_t tokens : more) {
    if (parts->states.count() == kMaxPromptStates) break;
    PREFILLD_RETURN_IF_ERROR(allocator.AddIfItFits(tokens));
  }
  return absl::OkStatus();
}

// Returns the time of the prompt's second layer, because the first one of a length finds its
// algorithms, and heads become pivots in it.
absl::StatusOr<double> TimeOfLayer(EngineParts* parts, AttentionPolicy policy, int64_t num_tokens) {
  std::mt19937_64 random(1);
  std::vector<uint32_t> tokens(static_cast<size_t>(num_tokens));
  for (uint32_t& token : tokens) {
    token = static_cast<uint32_t>(random() % static_cast<uint64_t>(parts->info.config.vocab_size));
  }
  AttentionOptions options = parts->info.default_attention;
  options.policy = policy;
  PREFILLD_ASSIGN_OR_RETURN(PromptState * state, parts->states.Take(num_tokens));
  // With log-probabilities all of the last layer is computed, too.
  state->Start(PackedPrompts({tokens}, /*pad_last=*/false), options, /*with_logprobs=*/true, {});
  PromptSequence sequence(parts, state);
  double us = 0.0;
  for (int layer = 0; layer < std::min<int>(2, parts->info.config.num_layers); ++layer) {
    PREFILLD_ASSIGN_OR_RETURN(const LayerReport report, sequence.RunLayer([] { return true; }));
    us = static_cast<double>(report.compute_us);
  }
  return us;
}

// Runs layers of prompts of 128 tokens, four times as many and so on, under the policies dense and
// share. Of each policy it measures as many lengths as fit into half a second, one at least. The
// prompts are random tokens, on which share may take longer than on prose.
absl::StatusOr<std::vector<LayerTime>> MeasureLayers(EngineParts* parts) {
  constexpr int64_t kFirstTokens = 128;
  constexpr int64_t kLengthRatio = 4;
  constexpr int64_t kMostUs = 500'000;
  constexpr int64_t kLikelyRatio = 8;  // of the times: between four and sixteen
  std::vector<LayerTime> times;
  for (const AttentionPolicy policy : {AttentionPolicy::kDense, AttentionPolicy::kShare}) {
    int64_t taken_us = 0;
    int64_t last_us = 0;
    Stopwatch stopwatch;
    for (int64_t n = std::min(kFirstTokens, parts->info.max_tokens);
         n <= parts->info.max_tokens && taken_us + kLikelyRatio * last_us <= kMostUs;
         n *= kLengthRatio) {
      PREFILLD_ASSIGN_OR_RETURN(const double us, TimeOfLayer(parts, policy, n));
      times.push_back({policy, n, us});
      last_us = stopwatch.LapUs();
      taken_us += last_us;
    }
  }
  return times;
}

}  // namespace

std::vector<int64_t> PlacesWithin(int64_t max_resident_tokens, int64_t long_tokens,
                                  int64_t short_tokens, int short_prompts) {
  std::vector<int64_t> places;
  int64_t left = max_resident_tokens;
  const auto add = [&](int64_t tokens) {
    if (tokens > left || places.size() == kMaxPromptStates) return false;
    places.push_back(tokens);
    left -= tokens;
    return true;
  };
  add(long_tokens);
  for (int i = 0; i < short_prompts; ++i) add(short_tokens);
  while (add(long_tokens)) {
  }
  if (left >= kKvStrideTokens) add(left / kKvStrideTokens * kKvStrideTokens);
  return places;
}

absl::StatusOr<std::unique_ptr<EngineParts>> CreateEngineParts(const EngineOptions& options) {
  PREFILLD_RETURN_IF_ERROR(ValidateOptions(options));
  auto parts = std::make_unique<EngineParts>();
  EngineInfo& info = parts->info;
  parts->block_tokens = options.block_tokens;
  parts->kv_slots = options.kv_slots;

  PREFILLD_ASSIGN_OR_RETURN(info.config,
                            LoadModelConfig(options.checkpoint_dir, options.overruled_config_keys));
  PREFILLD_ASSIGN_OR_RETURN(info.max_tokens, MaxTokens(options, info.config));
  info.model_name = ModelName(options.checkpoint_dir);

  PREFILLD_ASSIGN_OR_RETURN(parts->clusters, LoadClusters(options, info.config));
  info.default_attention =
      Apply(options.attention_overrides, Apply(parts->clusters.thresholds, AttentionOptions()));
  PREFILLD_RETURN_IF_ERROR(Validate(info.default_attention));
  info.calibrated_loss = parts->clusters.calibrated_loss;
  AttentionOptions without_groups;
  without_groups.coverage = 0.0f;
  info.attention_beyond_calibration = Apply(options.attention_overrides, without_groups);

  PREFILLD_ASSIGN_OR_RETURN(parts->device, CreateDevice(options.device, options.cpu_threads));
  const DeviceTraits& traits = parts->device->traits();
  info.device_name = traits.name;
  info.native_dtype = traits.compute_dtype;

  PREFILLD_ASSIGN_OR_RETURN(parts->weights,
                            LoadWeights(options.checkpoint_dir, info.config, *parts->device));
  info.fingerprint = parts->weights.fingerprint;
  info.unused_tensors = parts->weights.unused_tensors;
  PREFILLD_RETURN_IF_ERROR(CheckMadeFor(parts->clusters, info.fingerprint));

  const int64_t batch_tokens = traits.asynchronous ? kCudaBatchTokens : 0;
  parts->max_batch_tokens = options.max_batch_tokens.value_or(batch_tokens);
  if (traits.records) parts->max_graph_tokens = options.max_graph_tokens.value_or(kCudaGraphTokens);
  if (traits.asynchronous) parts->run_ahead_tokens = kCudaRunAheadTokens;
  PREFILLD_RETURN_IF_ERROR(AllocateMemory(options, parts.get()));
  if (!options.attention_overrides.crossover_tokens.has_value()) {
    PREFILLD_ASSIGN_OR_RETURN(info.default_attention.crossover_tokens, MeasureCrossover(*parts));
    info.attention_beyond_calibration.crossover_tokens = info.default_attention.crossover_tokens;
  }
  if (options.measure_layers) {
    PREFILLD_ASSIGN_OR_RETURN(info.layer_times, MeasureLayers(parts.get()));
  }
  if (options.prefix_cache_bytes > 0) {
    PREFILLD_ASSIGN_OR_RETURN(
        parts->prefixes,
        PrefixStore::Create(parts->device.get(), info.config, options.prefix_cache_bytes,
                            options.prefix_reuse, options.prefix_cache_events));
  }
  return parts;
}

}  // namespace prefilld::model
