// Layer-major prefill: the engine computes a prompt, or a batch of short ones, one layer at a time,
// and hands out each layer's KV when it is done.
//
// It is an interface so that the server can be tested against a fake. CreatePrefillEngine makes the
// real engine.
#ifndef PREFILLD_MODEL_PREFILL_PREFILL_ENGINE_H_
#define PREFILLD_MODEL_PREFILL_PREFILL_ENGINE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/dtype.h"
#include "kernels/kv_pack.h"
#include "model/checkpoint/config.h"
#include "model/device/device.h"
#include "model/prefill/prefix_cache.h"
#include "model/prefill/prefix_reuse.h"
#include "model/prefill/prompt_logprobs.h"
#include "model/sparse/attention_options.h"
#include "model/sparse/head_clusters.h"
#include "model/sparse/layer_report.h"

namespace prefilld::model {

// A part of a layer's KV, and the form it is packed in.
struct KvSelection {
  int prompt = 0;  // of the batch
  int64_t first_block = 0;
  int64_t num_blocks = 0;
  int block_tokens = 16;
  int first_head = 0;
  int num_heads = 0;
  kernels::KvOrder order = kernels::KvOrder::kNhd;
  kernels::DType dtype = kernels::DType::kBf16;  // of the elements; not read if they have scales
  kernels::KvScales scales = kernels::KvScales::kNone;
};

// Returns the bytes of a part of a layer when it is packed.
inline int64_t PackedBytes(const KvSelection& selection, int head_dim) {
  return kernels::PackedBytes({.num_blocks = selection.num_blocks,
                               .block_tokens = selection.block_tokens,
                               .num_heads = selection.num_heads,
                               .head_dim = head_dim,
                               .dst_dtype = selection.dtype,
                               .scales = selection.scales});
}

// The time of one layer of a prompt of its own.
struct LayerTime {
  AttentionPolicy policy = AttentionPolicy::kDense;  // the one that ran
  int64_t num_tokens = 0;
  double us = 0.0;
};

struct EngineInfo {
  ModelConfig config;
  std::string model_name;
  std::string fingerprint;
  std::vector<std::string> unused_tensors;  // of the checkpoint, see Weights
  std::string device_name;
  kernels::DType native_dtype = kernels::DType::kFp32;
  int64_t max_tokens = 0;
  AttentionOptions default_attention;
  std::vector<LayerTime> layer_times;  // measured at start; by policy and ascending length
  // The cluster file's promise of the loss. Prompts that are too long for it run by
  // attention_beyond_calibration, which has the built-in thresholds and shares nothing.
  std::optional<CalibratedLoss> calibrated_loss;
  AttentionOptions attention_beyond_calibration;
};

// A prompt, or a batch of them packed into one sequence, on its way through the layers. Its memory
// belongs to the engine; destroying the sequence gives it back. Several sequences may exist. Their
// RunLayer, FinalLogits and Logprobs belong to one compute thread, which may call those of any of
// them in any order: each sequence gives, bit for bit, what it gives alone. PackKv, ReleaseKv
// and PackCachedKv may be called by other threads beside them and each other.
class PrefillSequence {
 public:
  virtual ~PrefillSequence() = default;

  // Computes the next layer. On return its KV can be packed, and it stays until ReleaseKv. At most
  // PrefillEngine::kv_slots() layers of this sequence may be unreleased, the one being computed
  // included; otherwise FAILED_PRECONDITION, and the sequence may continue once one is released.
  // Layers of other sequences do not count.
  //
  // A layer of a long prompt has points inside it, between its tiles of tokens and the parts of its
  // attention. RunLayer calls `at_point` there. Meanwhile the caller may start and end sequences,
  // and compute those that may_interject(), but no others. When `at_point` returns false, RunLayer
  // returns CANCELLED, and nothing is left to do with the sequence but to destroy it.
  virtual absl::StatusOr<LayerReport> RunLayer(absl::FunctionRef<bool()> at_point) = 0;
  absl::StatusOr<LayerReport> RunLayer() {
    return RunLayer([] { return true; });
  }
  virtual bool may_interject() const = 0;

  // Writes a part of a finished layer, as PackKvParams says, to `dst`: memory from AllocateStaging,
  // as long as PackedBytes() says.
  virtual absl::Status PackKv(int layer, const KvSelection& selection, void* dst) = 0;
  virtual void ReleaseKv(int layer) = 0;  // of all prompts
  // Does what PackKv does for blocks that lie within cached_tokens(), from the prefix cache's
  // memory: of any layer, computed or not, at any time, without the device. Such blocks may be
  // packed in either way, with the same bytes. Thread-safe.
  virtual absl::Status PackCachedKv(int layer, const KvSelection& selection, void* dst) {
    return absl::FailedPreconditionError("no KV of this prompt is cached");
  }

  // Returns the logits of every prompt's last position, [num_prompts][vocab_size]. Must be called
  // after the last layer.
  virtual absl::StatusOr<std::vector<std::vector<float>>> FinalLogits() = 0;
  // Returns the entries of a prompt's log-probabilities from `first` on, at least one and as many
  // as one part has; none when there are no more. All of them together take long compared with a
  // layer, and between two parts other sequences may compute. Must be called after the last layer,
  // for a prompt whose PromptInput asked for them. On a GPU they come from logits rounded to bf16,
  // as FinalLogits returns them.
  virtual absl::StatusOr<PromptLogprobs> Logprobs(int prompt, int64_t first) = 0;

  // Returns the policy that runs, with kAuto resolved. It is dense for several prompts, and where
  // at most two blocks of patterns are computed behind a cached prefix.
  virtual AttentionPolicy policy() const = 0;
  // Returns how many tokens at the prompt's beginning came from the prefix cache. Thread-safe.
  virtual int64_t cached_tokens() const { return 0; }
  // Returns how long the device has computed for this sequence, in microseconds by its own clock:
  // what it computed for others at the points of a layer does not count. A layer counts when
  // RunLayer returns; within `at_point`, the parts of it that are known to be done count.
  virtual double device_us() const = 0;
};

struct PromptInput {
  absl::Span<const uint32_t> tokens;
  AttentionOptions attention;
  bool logprobs = false;  // will be asked for: all of the last layer is computed
  // The prefix cache is neither asked nor filled if this is false. It is not used either for
  // prompts whose hidden states are all needed (logprobs, an audit of recall), for baselines and
  // for batches.
  bool use_prefix_cache = true;
  absl::string_view cache_salt = "";  // prompts share prefixes with those of an equal salt alone
};

// The use of the prefix cache so far.
struct PrefixCacheUse {
  PrefixCacheCounts counts;  // all 0: there is no cache
  int64_t block_bytes = 0;   // memory of a slot
  double load_seconds = 0;   // spent copying to the device, most of it beside the computation
};

// The tokens of the prompts under way, and those for which there is memory.
struct ResidentTokens {
  int64_t used = 0;
  int64_t limit = 0;
};

// An engine with its model loaded. Beside Start, most methods are questions that its users ask
// before they start prompts: what fits, what may be computed together, what is cached.
class PrefillEngine {
 public:
  virtual ~PrefillEngine() = default;

  virtual const EngineInfo& info() const = 0;
  virtual int kv_slots() const = 0;  // of every sequence; at least 2
  virtual size_t allocated_bytes() const = 0;
  virtual int64_t num_recordings() const { return 0; }  // of layers; EngineOptions.max_graph_tokens
  virtual ResidentTokens resident_tokens() const { return {}; }  // thread-safe
  virtual PrefixCacheUse prefix_cache() const { return {}; }     // thread-safe
  // Returns the index of the prefix cache, to be followed; null: there is none.
  virtual const PrefixCache* prefix_index() const { return nullptr; }
  // Returns how many tokens of the prompt are in the prefix cache now. Others may evict them before
  // Start. Thread-safe.
  virtual int64_t CachedTokens(const PromptInput& prompt) const { return 0; }

  // Returns how many tokens prompts that are computed together may take in all. 0: prompts are not
  // computed together.
  virtual int64_t max_batch_tokens() const = 0;
  // Returns how many of those tokens such a prompt takes, padding included. 0: it runs alone,
  // because fewer than kFullBatchPrompts like it fit, or it is not dense, or its rotation differs
  // from others'.
  virtual int64_t BatchTokens(int64_t num_tokens, const AttentionOptions& options) const = 0;

  // Tells whether the sequence of such a prompt would be one that may_interject(): short and dense.
  virtual bool MayInterject(int64_t num_tokens, const AttentionOptions& options) const = 0;

  // Starts prompts of 1 .. max_tokens ids, each < vocab_size, with valid options. There may be
  // several if BatchTokens is above 0 for each and at most max_batch_tokens() in all (checked:
  // INVALID_ARGUMENT). A prompt's results are, except for rounding, those that it gives alone. The
  // sequence gets the smallest free place of EngineOptions.long_prompts and short_prompts that
  // holds so many tokens. RESOURCE_EXHAUSTED when other sequences have taken all of them, that is,
  // when CanStart says no.
  virtual absl::StatusOr<std::unique_ptr<PrefillSequence>> Start(
      absl::Span<const PromptInput> prompts) = 0;
  // Tells whether a place is free that holds so many tokens.
  virtual bool CanStart(int64_t num_tokens) const = 0;
  // Starts one prompt alone.
  absl::StatusOr<std::unique_ptr<PrefillSequence>> Start(absl::Span<const uint32_t> tokens,
                                                         const AttentionOptions& options,
                                                         bool logprobs = false) {
    const PromptInput prompt = {tokens, options, logprobs};
    return Start(absl::MakeConstSpan(&prompt, 1));
  }

  virtual absl::StatusOr<DeviceBuffer> AllocateStaging(size_t bytes) = 0;
  // Makes pinned staging memory of the caller's, as Device::AdoptStaging says. Thread-safe.
  virtual absl::StatusOr<DeviceBuffer> AdoptStaging(void* data, size_t bytes) {
    return DeviceBuffer();
  }
};

// The limit of EngineOptions.max_batch_tokens. A batch's pattern grows with the square: here it
// takes 2 MiB, or 8 of blocks of 64 tokens.
inline constexpr int64_t kMaxBatchTokens = int64_t{1} << 19;

// The limit of EngineOptions.max_graph_tokens: beyond it launches are a small part of any model's
// layer.
inline constexpr int64_t kMaxGraphTokens = 4096;

// A prompt is short enough for a batch if so many like it fit. On an H200 and a model of 7B, 16
// prompts of 128 tokens go through 1.9 times as fast as one by one, 8 of 256 1.41 times, 16 of 512
// only 1.11 times; and as each waits for the whole pass, the mean time to the first token of the
// last grows from 102 to 172 ms.
inline constexpr int64_t kFullBatchPrompts = 8;

// A place for a long prompt that nobody asked for must leave this much of a device's memory free,
// for recordings and for what the driver allocates on its own.
inline constexpr size_t kMemoryReserve = size_t{1} << 30;

// The limit of EngineOptions.prefix_cache_bytes: 64 TiB.
inline constexpr int64_t kMaxPrefixCacheBytes = int64_t{1} << 46;

// The limit of EngineOptions.prefix_cache_events.
inline constexpr int64_t kMaxPrefixCacheEvents = int64_t{1} << 20;

// The limit of EngineOptions.long_prompts and short_prompts together.
inline constexpr int kMaxPromptStates = 15;

struct EngineOptions {
  std::string checkpoint_dir;
  std::vector<std::string> overruled_config_keys;  // see LoadModelConfig
  std::string clusters_path;  // empty: <checkpoint_dir>/head_clusters.json if it is there
  DeviceChoice device = DeviceChoice::kAuto;
  int cpu_threads = 0;      // 0: all cores
  int64_t max_tokens = 0;   // longest prompt. 0: min(max_positions, 131072)
  int64_t tile_tokens = 0;  // tokens per tile of the wide projections. 0: chosen per device
  // Tokens of prompts computed together, see PrefillEngine; the workspace has room for so many, or
  // for max_tokens if those are more. 0: none are. Absent: 2048 on CUDA; none on the CPU, whose
  // cores one short prompt fills.
  std::optional<int64_t> max_batch_tokens;
  // The tokens that all prompts under way may have together. The memory of their states is
  // allocated at the start, in places of fixed sizes (PlacesWithin, model/prefill/engine_parts.h).
  // At least the longest prompt or batch. 0: there are places as the next two options say.
  int64_t max_resident_tokens = 0;
  // How many prompts of up to max_tokens may be under way at a time, at least 1. Each takes memory
  // of its own from the start, see PromptState (model/prefill/prompt_state.h). Absent: 1 on the
  // CPU; on CUDA 2, and 2 more of up to 131,072 tokens, without those that would leave less than
  // kMemoryReserve free.
  std::optional<int> long_prompts;
  // How many more prompts or batches may be under way that are short: of up to 8192 tokens on CUDA,
  // 4096 on the CPU, or max_batch_tokens if those are more. Absent: 4 on CUDA, 2 on the CPU.
  std::optional<int> short_prompts;
  // The work of a layer is recorded, and replayed for the next prompt or batch of the same padded
  // length, up to so many tokens: a GPU would wait for the host to launch it anew, kernel by
  // kernel. 0: never. Absent: 2048 on CUDA; the CPU has nothing to record.
  std::optional<int64_t> max_graph_tokens;
  // Dense prompts and batches of up to so many tokens may be computed at the points inside a layer
  // of a longer prompt. Their scratch memory is allocated at the start. Absent: 4096.
  std::optional<int64_t> interject_tokens;
  // The attention of a long prompt that is computed between two such points, in products of numbers
  // that Q K^T takes. 0: as much as the device takes some 30 ms for, or the CPU some 0.1 s.
  int64_t most_attention_work = 0;
  // Host memory for the KV of prefixes that later prompts may begin with; 0: none is kept. It is
  // allocated at the start, pinned on CUDA. Otherwise at least a block of kPrefixBlockTokens
  // tokens.
  int64_t prefix_cache_bytes = 0;
  PrefixReuseRule prefix_reuse = PrefixReuseRule::kLooser;
  // Changes of the prefix cache that are kept for those who follow it. 0: nobody can.
  int64_t prefix_cache_events = 0;
  int kv_slots = 3;        // of each prompt
  int block_tokens = 128;  // of attention patterns: 64 or 128
  // Fills EngineInfo.layer_times, which takes a second or two.
  bool measure_layers = false;
  // Reserves the memory that baseline policies take; without it Start refuses them.
  bool baselines = false;
  // EngineInfo.default_attention is the built-in options with the thresholds that the cluster file
  // names, and these over them. crossover_tokens is measured unless it is named here. A request may
  // override it in its turn.
  AttentionOverrides attention_overrides;
};

absl::StatusOr<std::unique_ptr<PrefillEngine>> CreatePrefillEngine(const EngineOptions& options);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_PREFILL_ENGINE_H_
