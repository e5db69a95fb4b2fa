// The parts of a prefill engine, which its sequences use, and how they are made from its options.
#ifndef PREFILLD_MODEL_PREFILL_ENGINE_PARTS_H_
#define PREFILLD_MODEL_PREFILL_ENGINE_PARTS_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "model/checkpoint/weights.h"
#include "model/device/device.h"
#include "model/prefill/layer_step.h"
#include "model/prefill/prefill_engine.h"
#include "model/prefill/prefix_store.h"
#include "model/prefill/prompt_state.h"
#include "model/prefill/turn_points.h"
#include "model/sparse/baseline_attention.h"
#include "model/sparse/head_clusters.h"
#include "model/sparse/sharing_workspace.h"

namespace prefilld::model {

// Everything is allocated when the engine is created. `states` hold what belongs to prompts; the
// step and the workspaces are scratch that all prompts use in turns, one layer at a time.
struct EngineParts {
  int block_tokens = 0;
  int kv_slots = 0;  // of a state
  int64_t max_batch_tokens = 0;
  int64_t max_graph_tokens = 0;  // 0: nothing is recorded
  // Prompts of at most so many tokens have their next layer queued while the previous one is
  // computed, if their attention never waits for the device. 0: none.
  int64_t run_ahead_tokens = 0;
  EngineInfo info;
  std::unique_ptr<Device> device;  // before all that lives in its memory
  Weights weights;
  HeadClusters clusters;
  std::unique_ptr<LayerStep> step;
  // The scratch of sequences that may interject: dense ones of at most interject_tokens.
  std::unique_ptr<LayerStep> short_step;
  int64_t interject_tokens = 0;
  std::unique_ptr<TurnPoints> points;
  std::unique_ptr<SharingWorkspace> sharing;
  std::unique_ptr<BaselineWorkspace> baseline;  // null: not asked for
  std::unique_ptr<PrefixStore> prefixes;        // null: no prefix cache
  PromptStatePool states;                       // borrow the workspaces

  // Tells whether prompts of so many tokens in all, padding included, use short_step.
  bool MayInterject(int64_t num_tokens, AttentionPolicy resolved) const {
    return resolved == AttentionPolicy::kDense && num_tokens <= interject_tokens;
  }
};

// Loads the model, opens the device and allocates all memory. Errors: as CreatePrefillEngine.
absl::StatusOr<std::unique_ptr<EngineParts>> CreateEngineParts(const EngineOptions& options);

// Returns how many tokens each state holds, if all of them together hold `max_resident_tokens` at
// most, which are no fewer than `long_tokens`. The first one holds long_tokens. Then come as many
// of `short_prompts` of short_tokens as fit, then more of long_tokens, and then one of what is
// left. There are kMaxPromptStates at most.
std::vector<int64_t> PlacesWithin(int64_t max_resident_tokens, int64_t long_tokens,
                                  int64_t short_tokens, int short_prompts);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_ENGINE_PARTS_H_
