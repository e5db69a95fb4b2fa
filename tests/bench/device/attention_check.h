// Checks that the attention that is timed is right: a few queries are computed again on the host.
#ifndef PREFILLD_TESTS_BENCH_DEVICE_ATTENTION_CHECK_H_
#define PREFILLD_TESTS_BENCH_DEVICE_ATTENTION_CHECK_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "model/device/device.h"
#include "tests/bench/device/attention_data.h"

namespace prefilld::bench {

class AttentionCheck {
 public:
  // Copies the keys and values to the host. Both parameters are borrowed.
  static absl::StatusOr<AttentionCheck> Create(model::Device* device, const AttentionData* data);

  // Compares data.out as it is now with softmax in double precision, over all heads of some
  // queries, the last one among them. `patterns` [num_heads, n, PatternWords(n)] tells the blocks;
  // if it is empty, all causal keys count. Returns ||out - expected|| / ||expected||, or INTERNAL
  // if that is more than the compute dtype allows.
  absl::StatusOr<double> Error(absl::Span<const uint32_t> patterns) const;

 private:
  AttentionCheck(model::Device* device, const AttentionData* data)
      : device_(*device), data_(*data) {}

  // Copies one row of queries or output, [num_heads, head_dim], from the device.
  absl::StatusOr<std::vector<float>> Row(const model::DeviceBuffer& rows, int64_t query) const;
  std::vector<double> Expected(const float* q, int64_t query, int head,
                               absl::Span<const uint32_t> patterns) const;

  model::Device& device_;
  const AttentionData& data_;
  std::vector<float> k_, v_;  // [num_kv_heads, num_tokens, head_dim]
};

}  // namespace prefilld::bench

#endif  // PREFILLD_TESTS_BENCH_DEVICE_ATTENTION_CHECK_H_
