// Whether what is timed is right: a few queries computed once more on the host.
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
  // Both borrowed. Copies the keys and values to the host.
  static absl::StatusOr<AttentionCheck> Create(model::Device* device, const AttentionData* data);

  // ||out - expected|| / ||expected|| over all heads of some queries, the last one among them, with
  // data.out as it is now and softmax in double precision over the blocks of `patterns` [num_heads,
  // n, PatternWords(n)], or over all causal keys where it is empty. INTERNAL above what the compute
  // dtype allows.
  absl::StatusOr<double> Error(absl::Span<const uint32_t> patterns) const;

 private:
  AttentionCheck(model::Device* device, const AttentionData* data)
      : device_(*device), data_(*data) {}

  // One row of queries or output, [num_heads, head_dim].
  absl::StatusOr<std::vector<float>> Row(const model::DeviceBuffer& rows, int64_t query) const;
  std::vector<double> Expected(const float* q, int64_t query, int head,
                               absl::Span<const uint32_t> patterns) const;

  model::Device& device_;
  const AttentionData& data_;
  std::vector<float> k_, v_;  // [num_kv_heads, num_tokens, head_dim]
};

}  // namespace prefilld::bench

#endif  // PREFILLD_TESTS_BENCH_DEVICE_ATTENTION_CHECK_H_
