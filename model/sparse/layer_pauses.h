// The seam by which whoever computes a long layer lets others go first.
#ifndef PREFILLD_MODEL_SPARSE_LAYER_PAUSES_H_
#define PREFILLD_MODEL_SPARSE_LAYER_PAUSES_H_

#include <algorithm>
#include <cstdint>
#include <limits>

#include "absl/status/status.h"
#include "kernels/attention.h"
#include "model/device/device.h"

namespace prefilld::model {

// The stages of a layer whose times are reported.
enum class LayerStage : uint8_t { kTokens, kPatterns, kAttention };  // the first: token by token
inline constexpr int kNumLayerStages = 3;

class LayerPauses {
 public:
  virtual ~LayerPauses() = default;

  // Is called between two parts of a layer that take long, the one before belonging to `stage`. The
  // time that others take here is not counted to that stage. Whatever the layer has queued so far,
  // and the scratch that it uses, stays as it is. CANCELLED: the layer must not be finished.
  virtual absl::Status Reach(LayerStage stage) = 0;

  // Returns how much attention may lie between two pauses instead of what the device takes some 30
  // ms for, as MostWorkBetweenPauses counts it. 0: as much as that.
  virtual int64_t most_attention_work() const { return 0; }
};

// Returns how much attention may lie between two pauses: products of numbers that Q K^T takes. If
// there are no pauses, all may.
inline int64_t MostWorkBetweenPauses(const DeviceTraits& device, const LayerPauses* pauses) {
  // They take some 30 ms on a multiprocessor of an H200, which has the fastest kernels, and three
  // times that on one of an A100.
  constexpr int64_t kOfAMultiprocessor = int64_t{18'000} * 128 * 128 * 128;
  // They take some 0.1 s on a core.
  constexpr int64_t kOfAThread = int64_t{4'500'000'000};
  if (pauses == nullptr) return std::numeric_limits<int64_t>::max();
  if (pauses->most_attention_work() > 0) return pauses->most_attention_work();
  return device.parallel_tiles * (device.asynchronous ? kOfAMultiprocessor : kOfAThread);
}

// Returns how many heads of such an attention are a part that is worth a pause behind it, and still
// fills the device: those that share a KV head, or several times as many, and on the CPU single
// ones of the longest prompts. All heads of a short prompt are one part.
inline int HeadsBetweenPauses(const DeviceTraits& device,
                              const kernels::AttentionParams& attention) {
  // From these lengths on the dense attention of one KV head's queries takes some 10 ms on an H200
  // and some 50 ms on two cores.
  constexpr int64_t kLongOnGpu = 65536;
  constexpr int64_t kLongOnCpu = 4096;
  constexpr int64_t kLongForOneHeadOnCpu = 16384;  // which takes some 0.1 s
  constexpr int kMostParts = 8;
  if (attention.num_queries < (device.asynchronous ? kLongOnGpu : kLongOnCpu)) {
    return attention.num_heads;
  }
  if (!device.asynchronous && attention.num_queries >= kLongForOneHeadOnCpu) {
    return std::max(1, attention.num_heads / kMostParts);
  }
  const int group = attention.num_heads / attention.num_kv_heads;
  return std::max(group, attention.num_heads / kMostParts / group * group);
}

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_LAYER_PAUSES_H_
