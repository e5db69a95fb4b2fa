#include "model/prefill/prefix_store.h"

#include "absl/strings/str_cat.h"
#include "kernels/dtype.h"
#include "proto/status_macros.h"

namespace prefilld::model {

PrefixStore::PrefixStore(Device* device, const ModelConfig& config, int64_t num_slots,
                         PrefixReuseRule rule, int64_t num_events)
    : device_(*device),
      copies_(device->host_copies()),
      num_layers_(config.num_layers),
      num_kv_heads_(config.num_kv_heads),
      row_bytes_(RowBytes(*device, config)),
      num_slots_(num_slots),
      head_dim_(config.head_dim),
      index_(num_slots, rule, Xxh3PrefixHash, static_cast<size_t>(num_events)) {}

int64_t PrefixStore::RowBytes(const Device& device, const ModelConfig& config) {
  return kPrefixBlockTokens * config.head_dim *
         static_cast<int64_t>(kernels::SizeOf(device.traits().compute_dtype));
}

absl::StatusOr<std::unique_ptr<PrefixStore>> PrefixStore::Create(Device* device,
                                                                 const ModelConfig& config,
                                                                 int64_t bytes,
                                                                 PrefixReuseRule rule,
                                                                 int64_t num_events) {
  const int64_t row_bytes = RowBytes(*device, config);
  const int64_t block_bytes = 2 * int64_t{config.num_layers} * config.num_kv_heads * row_bytes;
  const int64_t num_slots = bytes / block_bytes;
  const int64_t most_slots = static_cast<int64_t>(RowCopy::kMaxStride) / row_bytes;
  if (num_slots < 1 || num_slots > most_slots) {
    return absl::InvalidArgumentError(absl::StrCat(
        "prefix_cache_bytes ", bytes, " is outside ", block_bytes, " to ", most_slots * block_bytes,
        ": a block of ", kPrefixBlockTokens, " tokens takes ", block_bytes));
  }
  std::unique_ptr<PrefixStore> store(new PrefixStore(device, config, num_slots, rule, num_events));
  PREFILLD_ASSIGN_OR_RETURN(store->memory_,
                            device->AllocateStaging(static_cast<size_t>(num_slots * block_bytes)));
  return store;
}

char* PrefixStore::HostAddress(int layer, int tensor, int slot) const {
  const int64_t row = (2 * int64_t{layer} + tensor) * num_kv_heads_ * num_slots_ + slot;
  return memory_.as<char>() + row * row_bytes_;
}

std::vector<RowCopy> PrefixStore::Copies(absl::Span<const int> slots, int64_t first_block,
                                         int layer, const KvSlot& slot, int64_t kv_head_stride,
                                         bool to_device) const {
  const int64_t host_stride = num_slots_ * row_bytes_;
  const int64_t device_stride = kv_head_stride * (row_bytes_ / (kPrefixBlockTokens * head_dim_));
  std::vector<RowCopy> copies;
  for (size_t first = 0, end = 1; first < slots.size(); first = end++) {
    while (end < slots.size() && slots[end] == slots[end - 1] + 1) ++end;
    for (const int tensor : {0, 1}) {
      char* host = HostAddress(layer, tensor, slots[first]);
      char* device = static_cast<char*>(tensor == 0 ? slot.k : slot.v) +
                     (first_block + static_cast<int64_t>(first)) * row_bytes_;
      copies.push_back({.dst = to_device ? device : host,
                        .dst_stride = static_cast<size_t>(to_device ? device_stride : host_stride),
                        .src = to_device ? host : device,
                        .src_stride = static_cast<size_t>(to_device ? host_stride : device_stride),
                        .row_bytes = (end - first) * static_cast<size_t>(row_bytes_),
                        .rows = static_cast<size_t>(num_kv_heads_)});
    }
  }
  return copies;
}

absl::Status PrefixStore::StartLoad(const PrefixLease& lease, int layer, const KvSlot& slot,
                                    int64_t kv_head_stride) {
  return copies_.StartLoads(
      Copies(lease.found(), 0, layer, slot, kv_head_stride, /*to_device=*/true));
}

absl::Status PrefixStore::StartSave(const PrefixLease& lease, int layer, const KvSlot& slot,
                                    int64_t kv_head_stride) {
  return copies_.StartSaves(Copies(lease.added(), lease.first_new_block(), layer, slot,
                                   kv_head_stride, /*to_device=*/false));
}

void PrefixStore::PackFound(const PrefixLease& lease, int layer,
                            kernels::PackKvParams params) const {
  params.k = HostAddress(layer, 0, 0);
  params.v = HostAddress(layer, 1, 0);
  params.kv_head_stride = num_slots_ * kPrefixBlockTokens * head_dim_;
  device_.PackHostKv(params, lease.found(), static_cast<int>(kPrefixBlockTokens));
}

}  // namespace prefilld::model
