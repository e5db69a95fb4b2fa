#include "model/prefill/kv_slots.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace prefilld::model {

absl::StatusOr<std::unique_ptr<KvSlots>> KvSlots::Create(Device* device, int num_slots,
                                                         size_t bytes_per_tensor) {
  std::vector<Memory> memory;
  for (int i = 0; i < num_slots; ++i) {
    PREFILLD_ASSIGN_OR_RETURN(DeviceBuffer k, device->Allocate(bytes_per_tensor));
    PREFILLD_ASSIGN_OR_RETURN(DeviceBuffer v, device->Allocate(bytes_per_tensor));
    memory.push_back({std::move(k), std::move(v)});
  }
  return std::unique_ptr<KvSlots>(new KvSlots(std::move(memory)));
}

bool KvSlots::HasFree() const {
  absl::MutexLock lock(&mu_);
  return std::any_of(holders_.begin(), holders_.end(),
                     [](const Holder& holder) { return holder.layer == kFree; });
}

absl::StatusOr<KvSlot> KvSlots::Acquire(int layer) {
  absl::MutexLock lock(&mu_);
  for (int tried = 0; tried < count(); ++tried) {
    const int i = (layer + tried) % count();
    if (holders_[i].layer != kFree) continue;
    holders_[i] = {.layer = layer, .computed = false};
    return memory_[i].slot();
  }
  return absl::FailedPreconditionError(
      absl::StrCat("no KV slot for layer ", layer, ": all ", count(), " hold unreleased layers"));
}

void KvSlots::MarkComputed(int layer) {
  absl::MutexLock lock(&mu_);
  for (Holder& holder : holders_) {
    if (holder.layer == layer) holder.computed = true;
  }
}

absl::StatusOr<KvSlot> KvSlots::Computed(int layer) const {
  absl::MutexLock lock(&mu_);
  for (size_t i = 0; i < holders_.size(); ++i) {
    if (holders_[i].layer == layer && holders_[i].computed) return memory_[i].slot();
  }
  return absl::FailedPreconditionError(
      absl::StrCat("the KV of layer ", layer, " is not there: not computed, or released"));
}

void KvSlots::Release(int layer) {
  absl::MutexLock lock(&mu_);
  for (Holder& holder : holders_) {
    if (holder.layer == layer) holder = Holder();
  }
}

void KvSlots::ReleaseAll() {
  absl::MutexLock lock(&mu_);
  for (Holder& holder : holders_) holder = Holder();
}

}  // namespace prefilld::model
