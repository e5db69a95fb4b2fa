// Measures how much of the true attention mass the patterns of a prompt hold, to tell whether
// sparsity is safe on it.
//
// The recall of a head is the mean over its queries of the softmax mass inside its pattern. 1 is
// dense attention; 1 - recall is the weight that the sparse output lost. Only the whole softmax
// tells which blocks a head should have computed, so the audit computes it for a sample: the rows
// of a few query blocks against all of their keys. The result is exact for those queries and
// unbiased for the others, since every query block has the same chance to be chosen.
//
// A row costs about as much as the estimate does for as many keys, half of it on average over the
// prompt. k rows of B queries are k B / N of the layer's dense attention (8 rows: 0.8 % at 128k
// tokens, 12 % at 8k), whatever the number of heads, and take no memory that grows with the prompt.
#ifndef PREFILLD_MODEL_SPARSE_RECALL_AUDIT_H_
#define PREFILLD_MODEL_SPARSE_RECALL_AUDIT_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/attention.h"
#include "model/device/device.h"

namespace prefilld::model {

class HeadEstimate;

// The origin of a sparse head's pattern.
enum class PatternSource : uint8_t { kPivot, kScored, kVerticalSlash, kBaseline };

struct HeadRecall {
  int layer = 0;
  int head = 0;
  PatternSource source = PatternSource::kVerticalSlash;
  float recall = 0.0f;  // 0 to 1
};

struct RecallSummary {
  double mean = 0.0;
  double fifth_percentile = 0.0;  // at least one head in twenty is no better than this
  HeadRecall lowest;              // the first in order among equals
};
// Summarizes the recalls. `heads` must not be empty.
RecallSummary Summarize(absl::Span<const HeadRecall> heads);

// Chooses the query blocks to measure, ascending and distinct: one of each of `num_rows` equal
// stretches of the prompt. The place in a stretch differs from layer to layer, but not from one
// request to the next. All blocks are chosen when num_rows is num_blocks or more.
std::vector<int64_t> AuditedRows(int64_t num_blocks, int64_t num_rows, int layer);

// Measures recall on one device. Not thread-safe.
class RecallAudit {
 public:
  // Creates an audit. The device is borrowed and must outlive it. `num_heads` bounds
  // attention.num_work.
  static absl::StatusOr<std::unique_ptr<RecallAudit>> Create(Device* device, int num_heads);

  // Measures before `attention`, which describes the whole prompt, runs; afterwards its queries may
  // be overwritten. recall[i] is that of attention.work[i], 1 for a dense head; [num_work]. Waits
  // for the device once per row. `estimate` is overwritten.
  absl::Status Measure(const kernels::AttentionParams& attention, int layer, int64_t num_rows,
                       HeadEstimate& estimate, absl::Span<float> recall);

 private:
  RecallAudit(Device* device, int num_heads) : device_(*device), num_heads_(num_heads) {}

  absl::Status MeasureRow(const kernels::AttentionParams& attention, int64_t row,
                          HeadEstimate& estimate);

  Device& device_;
  const int num_heads_;
  DeviceBuffer figures_;      // [num_heads] mass as double, [num_heads] blocks as int64
  std::vector<double> mass_;  // [num_heads], host copy
  std::vector<double> mass_times_queries_;  // [num_heads], sum over the rows
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_RECALL_AUDIT_H_
