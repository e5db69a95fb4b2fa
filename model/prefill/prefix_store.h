// The memory of the prefix cache, and how KV gets in and out of it.
#ifndef PREFILLD_MODEL_PREFILL_PREFIX_STORE_H_
#define PREFILLD_MODEL_PREFILL_PREFIX_STORE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/kv_pack.h"
#include "model/checkpoint/config.h"
#include "model/device/device.h"
#include "model/device/host_copies.h"
#include "model/prefill/kv_slots.h"
#include "model/prefill/prefix_cache.h"

namespace prefilld::model {

// One piece of host memory for all blocks, allocated once. In the compute dtype it is
//   [num_layers][2 (K, V)][num_kv_heads][num_slots][kPrefixBlockTokens][head_dim]
// so blocks of neighbouring slots are neighbours in every head, and go in one copy.
class PrefixStore {
 public:
  // Allocates as many slots as fit into `bytes`. The device is borrowed and must outlive the store.
  // `num_events`: see PrefixCache.
  // INVALID_ARGUMENT when not one fits, or too many.
  static absl::StatusOr<std::unique_ptr<PrefixStore>> Create(Device* device,
                                                             const ModelConfig& config,
                                                             int64_t bytes, PrefixReuseRule rule,
                                                             int64_t num_events = 0);

  PrefixCache& index() { return index_; }
  const PrefixCache& index() const { return index_; }
  int64_t block_bytes() const { return 2 * num_layers_ * num_kv_heads_ * row_bytes_; }

  // StartLoad starts to copy the blocks that `lease` found into the KV slot of `layer`, and
  // StartSave to copy those that the lease adds out of it. The slot's heads are `kv_head_stride`
  // elements apart. HostCopies says how the copies are ordered with ops, and how to wait for them.
  absl::Status StartLoad(const PrefixLease& lease, int layer, const KvSlot& slot,
                         int64_t kv_head_stride);
  absl::Status StartSave(const PrefixLease& lease, int layer, const KvSlot& slot,
                         int64_t kv_head_stride);

  // Packs whole blocks that `lease` found, as `params` says but for k, v and kv_head_stride, which
  // it fills in. It reads host memory alone. Thread-safe, and beside StartLoad and StartSave.
  void PackFound(const PrefixLease& lease, int layer, kernels::PackKvParams params) const;

 private:
  PrefixStore(Device* device, const ModelConfig& config, int64_t num_slots, PrefixReuseRule rule,
              int64_t num_events);

  // The size of a block's tokens in one head.
  static int64_t RowBytes(const Device& device, const ModelConfig& config);
  char* HostAddress(int layer, int tensor, int slot) const;
  // Describes the copies to the device, or from it, for blocks first_block and on in `slots`.
  std::vector<RowCopy> Copies(absl::Span<const int> slots, int64_t first_block, int layer,
                              const KvSlot& slot, int64_t kv_head_stride, bool to_device) const;

  const Device& device_;
  HostCopies& copies_;
  const int64_t num_layers_;
  const int64_t num_kv_heads_;
  const int64_t row_bytes_;
  const int64_t num_slots_;
  const int64_t head_dim_;
  PrefixCache index_;
  DeviceBuffer memory_;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_PREFIX_STORE_H_
