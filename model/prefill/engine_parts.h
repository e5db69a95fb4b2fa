// What a prefill engine is made of, and what its running sequence uses.
#ifndef PREFILLD_MODEL_PREFILL_ENGINE_PARTS_H_
#define PREFILLD_MODEL_PREFILL_ENGINE_PARTS_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/attention.h"
#include "model/checkpoint/weights.h"
#include "model/device/device.h"
#include "model/prefill/kv_slots.h"
#include "model/prefill/layer_step.h"
#include "model/prefill/prefill_engine.h"
#include "model/sparse/baseline_attention.h"
#include "model/sparse/head_clusters.h"
#include "model/sparse/pattern_sharing.h"

namespace prefilld::model {

// KV heads start at multiples of this many tokens, so that a kernel may load whole tiles.
inline constexpr int64_t kKvStrideTokens = 128;

inline int64_t RoundUp(int64_t n, int64_t multiple) {
  return kernels::CeilDiv(n, multiple) * multiple;
}

// Everything is allocated when the engine is created.
struct EngineParts {
  int block_tokens = 0;
  int64_t max_batch_tokens = 0;
  int64_t max_graph_tokens = 0;  // 0: nothing is recorded
  // Dense prompts of at most so many tokens have their next layer queued behind the one that is
  // waited for. 0: none.
  int64_t run_ahead_tokens = 0;
  EngineInfo info;
  std::unique_ptr<Device> device;  // before all that lives in its memory
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

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_ENGINE_PARTS_H_
