// Device memory for the keys and values of the layers on their way out.
#ifndef PREFILLD_MODEL_PREFILL_KV_SLOTS_H_
#define PREFILLD_MODEL_PREFILL_KV_SLOTS_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "model/device/device.h"

namespace prefilld::model {

// K and V of one layer, each of the size of a slot.
struct KvSlot {
  void* k = nullptr;
  void* v = nullptr;
};

// The slots of one prompt's state. A slot holds one layer from the moment its computation begins
// until its release. Each state has its own slots instead of a share of a common pool, so that a
// prompt whose consumer is slow delays only its own layers.
//
// Thread-safe. The callers guard the memory itself by their order: it is written between Acquire
// and MarkComputed, and read between MarkComputed and Release.
class KvSlots {
 public:
  static absl::StatusOr<std::unique_ptr<KvSlots>> Create(Device* device, int num_slots,
                                                         size_t bytes_per_tensor);

  int count() const { return static_cast<int>(memory_.size()); }

  bool HasFree() const;
  // Takes a slot, preferably slot layer % count(), so that a layer mostly meets the same memory.
  // FAILED_PRECONDITION when every slot holds a layer.
  absl::StatusOr<KvSlot> Acquire(int layer);
  void MarkComputed(int layer);
  // Returns the slot of a layer. FAILED_PRECONDITION when the layer is not computed yet, or has
  // been released.
  absl::StatusOr<KvSlot> Computed(int layer) const;
  // Frees the slot of a layer. Does nothing if the layer has none.
  void Release(int layer);
  void ReleaseAll();

 private:
  static constexpr int kFree = -1;
  struct Memory {
    DeviceBuffer k, v;
    KvSlot slot() const { return {k.data(), v.data()}; }
  };
  struct Holder {
    int layer = kFree;
    bool computed = false;
  };

  explicit KvSlots(std::vector<Memory> memory)
      : memory_(std::move(memory)), holders_(memory_.size()) {}

  const std::vector<Memory> memory_;
  mutable absl::Mutex mu_;
  std::vector<Holder> holders_ ABSL_GUARDED_BY(mu_);  // [count()]
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_KV_SLOTS_H_
