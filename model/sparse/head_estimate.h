// Estimates what each head attends to from a prompt's last queries, and builds vertical-slash
// patterns from that.
#ifndef PREFILLD_MODEL_SPARSE_HEAD_ESTIMATE_H_
#define PREFILLD_MODEL_SPARSE_HEAD_ESTIMATE_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/attention.h"
#include "model/device/device.h"

namespace prefilld::model {

// The estimate of kernels/pattern.h with the device memory that it takes. n and W are defined
// there. Not thread-safe.
class HeadEstimate {
 public:
  // Creates an estimate for prompts of up to max_tokens. The device is borrowed and must outlive
  // it.
  static absl::StatusOr<std::unique_ptr<HeadEstimate>> Create(Device* device, int num_heads,
                                                              int64_t max_tokens, int block_tokens);

  // Estimates from the last block_tokens queries of `attention`, or as many as it has.
  absl::Status OfLastQueries(const kernels::AttentionParams& attention);
  // Estimates from queries [first, end), at most a block, as if the prompt ended with them.
  absl::Status OfQueries(const kernels::AttentionParams& attention, int64_t first, int64_t end);

  // Builds patterns [num_heads, num_query_blocks, W] from the last estimate, for the query blocks
  // of its `attention`. Writes the number of blocks of each to `blocks` [num_heads], which may be
  // null.
  absl::Status BuildVerticalSlash(float gamma, int64_t min_budget_tokens, uint32_t* patterns,
                                  int64_t* blocks);
  // Builds the pattern [n, W] of one head.
  absl::Status BuildVerticalSlashOf(int head, float gamma, int64_t min_budget_tokens,
                                    uint32_t* pattern);

  // The results of the last estimate, in fp32. num_keys is the number of keys that it covered.
  const DeviceBuffer& block_mass() const { return block_mass_; }  // [num_heads, n]
  const DeviceBuffer& vertical() const { return vertical_; }      // [num_heads, num_keys]
  const DeviceBuffer& slash() const { return slash_; }            // [num_heads, num_keys]

 private:
  // Builds the patterns of `count` heads from `first` on.
  absl::Status Build(int first, int count, float gamma, int64_t min_budget_tokens,
                     uint32_t* patterns, int64_t* blocks);

  HeadEstimate(Device* device, int num_heads, int block_tokens)
      : device_(*device), num_heads_(num_heads), block_tokens_(block_tokens) {}

  Device& device_;
  const int num_heads_;
  const int block_tokens_;

  DeviceBuffer block_mass_, vertical_, slash_;
  DeviceBuffer scratch_;
  DeviceBuffer columns_, diagonals_;  // [num_heads, W]
  int64_t num_keys_ = 0;
  int64_t first_query_block_ = 0;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_HEAD_ESTIMATE_H_
