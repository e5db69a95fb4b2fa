// The queries, keys and values of one layer in a device's memory.
#ifndef PREFILLD_TESTS_BENCH_DEVICE_ATTENTION_DATA_H_
#define PREFILLD_TESTS_BENCH_DEVICE_ATTENTION_DATA_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/attention.h"
#include "model/device/device.h"

namespace prefilld::bench {

struct AttentionData {
  int64_t num_tokens = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  model::DeviceBuffer q;    // [num_tokens, num_heads, head_dim]
  model::DeviceBuffer k;    // [num_kv_heads, num_tokens, head_dim]
  model::DeviceBuffer v;    // as k
  model::DeviceBuffer out;  // as q

  // Describes attention over the whole prompt in blocks of 128 tokens, without work items.
  kernels::AttentionParams Params() const;
};

// Makes independent normal values. Their attention is nearly flat, so only dense attention and
// given patterns make sense.
absl::StatusOr<AttentionData> RandomAttentionData(model::Device& device, int64_t num_tokens,
                                                  int num_heads, int num_kv_heads, int head_dim);

// Loads the tensors q [1, N, H, d], k and v [1, N, H_kv, d] of `folder`/model.safetensors.
absl::StatusOr<AttentionData> LoadAttentionData(model::Device& device, const std::string& folder);

}  // namespace prefilld::bench

#endif  // PREFILLD_TESTS_BENCH_DEVICE_ATTENTION_DATA_H_
