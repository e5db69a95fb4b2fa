// The state of a prompt, or of a batch of them, on its way through the layers, and the pool of such
// states that an engine has.
#ifndef PREFILLD_MODEL_PREFILL_PROMPT_STATE_H_
#define PREFILLD_MODEL_PREFILL_PROMPT_STATE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "model/checkpoint/config.h"
#include "model/device/device.h"
#include "model/prefill/hidden_states.h"
#include "model/prefill/kv_slots.h"
#include "model/prefill/packed_prompts.h"
#include "model/prefill/prefill_engine.h"
#include "model/prefill/prefix_cache.h"
#include "model/prefill/turn_points.h"
#include "model/sparse/attention_options.h"
#include "model/sparse/attention_strategy.h"
#include "model/sparse/baseline_attention.h"
#include "model/sparse/dense_strategy.h"
#include "model/sparse/pattern_sharing.h"

namespace prefilld::model {

// KV heads start at multiples of this many tokens, so that a kernel may load whole tiles.
inline constexpr int64_t kKvStrideTokens = 128;

inline int64_t RoundUp(int64_t n, int64_t multiple) {
  return kernels::CeilDiv(n, multiple) * multiple;
}

// The parts that all states of an engine share. They are borrowed.
struct PromptStateParts {
  Device* device = nullptr;
  const ModelConfig* config = nullptr;
  LayerPauses* points = nullptr;
  SharingWorkspace* sharing = nullptr;
  BaselineWorkspace* baseline = nullptr;  // null: baseline policies are refused
  int block_tokens = 0;                   // of attention patterns
  int64_t max_prompt_tokens = 0;          // of a prompt alone
  int64_t max_batch_tokens = 0;           // 0: no batches
  int kv_slots = 0;
};

// Everything that a prompt's later layers need of its earlier ones, and nothing that a layer needs
// only while it is computed: that is LayerStep's and the workspaces'. So two states may take turns,
// layer by layer in any order, and each gives what it would give alone.
//
// A state is used by one sequence (model/prefill/prompt_sequence.h) at a time, and by one after the
// other. Create allocates its device memory. For N = max_tokens and elements of e bytes that is
//   N * hidden * e                                    hidden states
//   kv_slots * 2 * N * num_kv_heads * head_dim * e    the layers on their way out
//   num_clusters * n * W * 4                          patterns of pivots; n blocks of the longest
//                                                     prompt alone, W words of a pattern row
// and a few kilobytes to megabytes for batches. At 1M tokens of Qwen2.5-7B's shape, in bf16 and
// with 3 slots, that is 6.7 + 5.7 GiB, and 7 MiB a cluster.
//
// The fields are public because a state only holds: PromptSequence and the strategies do the work.
struct PromptState {
  // Two layers of a prompt may be under way at a time, so every point has two marks.
  enum Point { kLayerBegins, kLayerDone, kNumPoints };
  static constexpr int kNumMarks = 2 * kNumPoints + DenseStrategy::kNumMarks;

  // For `max_tokens` in all, padding included. Uses the device's marks from `first_mark` on.
  static absl::StatusOr<std::unique_ptr<PromptState>> Create(const PromptStateParts& parts,
                                                             int64_t max_tokens, int first_mark);

  // Forgets the prompt before and takes this one, or this batch. `prefix_lease` is that of a prompt
  // alone, or of nothing; what it found is not computed.
  void Start(PackedPrompts next, const AttentionOptions& attention, bool with_logprobs,
             PrefixLease prefix_lease);

  // Returns the strategy that computes the attention of this prompt or batch, except in layers of a
  // last query.
  AttentionStrategy& strategy();

  int MarkOf(Point point, int layer) const { return first_mark + 2 * point + layer % 2; }
  bool is_batch() const { return prompts.count() > 1; }
  // Counts the tokens of all prompts, padding included.
  int64_t num_tokens() const { return static_cast<int64_t>(prompts.tokens().size()); }
  // Counts those whose KV is loaded. They are the first ones.
  int64_t num_cached() const { return prefix.found_tokens(); }
  int64_t num_computed() const { return num_tokens() - num_cached(); }

  PromptState(const PromptStateParts& parts, int64_t max_tokens, int first_mark);

  const int64_t max_tokens;
  const int first_mark;

  // The memory, and the strategies that use it.
  HiddenStates hidden;
  std::unique_ptr<KvSlots> slots;
  DeviceBuffer batch_pattern;  // block-diagonal; written by each batch (PackedPrompts::Pattern)
  DenseStrategy dense;         // dense prompts, and the last query of any
  std::unique_ptr<DenseStrategy> batch;  // by batch_pattern; null: no batches
  std::unique_ptr<PatternSharing> sharing;
  std::unique_ptr<BaselineAttention> baseline;  // null: none

  // The prompt or batch.
  PackedPrompts prompts;
  AttentionOptions options;  // the policy is resolved; dense for a batch
  bool logprobs = false;     // will be asked for
  PrefixLease prefix;
  // The layer whose cached KV is on its way, before its computation begins, and the slot that it
  // goes to.
  std::optional<std::pair<int, KvSlot>> loading;
  int started_layers = 0;           // queued
  int next_layer = 0;               // to be waited for
  InterruptedTimes interrupted[2];  // of the layers that may be under way
  absl::Status failure;             // of a layer: the hidden states are lost with it
};

// The prompt states of an engine, each free or taken. Thread-safe.
class PromptStatePool {
 public:
  // Adds a free state. Not to be called once Take has been.
  void Add(std::unique_ptr<PromptState> state);

  // Takes the smallest free state that holds so many tokens. If several are equal, it takes the one
  // that was added first, so that prompts that come one by one meet the same memory and its
  // recordings. RESOURCE_EXHAUSTED when none is free.
  absl::StatusOr<PromptState*> Take(int64_t num_tokens);

  // Tells whether Take would find a state.
  bool CanTake(int64_t num_tokens) const;

  // Frees a state and its KV slots. Work that is still queued for it must be ordered before
  // everything that its next user queues.
  void GiveBack(PromptState* state);

  // Returns the tokens of the prompts that have taken states, and those that all states hold.
  ResidentTokens resident_tokens() const;

  int count() const;
  // Returns the state that holds most tokens.
  PromptState& largest();

 private:
  struct Entry {
    std::unique_ptr<PromptState> state;
    bool taken = false;
    int64_t num_tokens = 0;  // for which it is taken
  };

  mutable absl::Mutex mu_;
  std::vector<Entry> entries_ ABSL_GUARDED_BY(mu_);  // ascending by max_tokens
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_PROMPT_STATE_H_
