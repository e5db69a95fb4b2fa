// Sparse attention of one layer by SharePrefill (Peng et al., "Accelerating Prefilling for
// Long-Context LLMs via Sparse Pattern Sharing", arXiv 2505.19578), online part.
//
// Two observations carry it: the attention patterns of many heads are alike, and which heads are
// alike is a property of the model (model/sparse/head_clusters.h) though the patterns change
// with the prompt. So, prompt by prompt and layer by layer:
//   1 Estimate  From the last block of queries: mass per key block, per column, per diagonal.
//   2 Decide    The first head of a cluster becomes its pivot; heads near enough to their
//               pivot share; all others take their own vertical-slash set
//               (model/sparse/sharing_decision.h).
//   3 Pivot     Dense attention that also yields the exact mass of every block. Per row of blocks
//               the smallest set that holds gamma of it, with block 0 and the diagonal, is the
//               cluster's pattern for the rest of the prompt.
//   4 Coverage  What the pivot's own vertical-slash set holds of its exact mass, and what it costs
//               beside the pattern, says whether the cluster gains by sharing. Computed on a
//               set: no block counts twice.
//   5 Attend    Shared heads over the pivot's pattern plus the blocks of the last row that
//               their own estimate found; the others over their vertical-slash set.
#ifndef PREFILLD_MODEL_SPARSE_PATTERN_SHARING_H_
#define PREFILLD_MODEL_SPARSE_PATTERN_SHARING_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "model/checkpoint/config.h"
#include "model/device/device.h"
#include "model/sparse/attention_options.h"
#include "model/sparse/head_clusters.h"
#include "model/sparse/head_estimate.h"
#include "model/sparse/layer_report.h"
#include "model/sparse/recall_audit.h"
#include "model/sparse/sharing_decision.h"

namespace prefilld::model {

// Where the time of a layer goes, in microseconds by the device's clock; host_us by the host's.
struct PatternStages {
  double estimate_us = 0.0;
  double select_us = 0.0;  // vertical-slash sets, their patterns, the blocks of the last row
  // From then until the sparse heads can run: the rest of the host's decisions, and what measuring
  // pivots takes.
  double decide_us = 0.0;
  double host_us = 0.0;    // what the host computes to decide, most of it beside select_us
  double pivots_us = 0.0;  // attention of pivots
};

// The state of one prompt at a time and the device memory for the longest one, allocated by
// Create. With W = words of a pattern row and n = blocks of the longest prompt that is, in bytes,
// (num_heads + num_clusters) * n * W * 4 for patterns (8.4 MB each at 1M tokens and 128-token
// blocks), and n * n * 4 for each pivot whose block mass is held at a time. Every shared cluster
// keeps at most one pivot. Not thread-safe.
class PatternSharing {
 public:
  static constexpr int kNumMarks = 8;  // uses marks 0 .. of the device

  // All borrowed; they outlive this.
  static absl::StatusOr<std::unique_ptr<PatternSharing>> Create(Device* device,
                                                                const ModelConfig* config,
                                                                const HeadClusters* clusters,
                                                                int64_t max_tokens,
                                                                int block_tokens);

  // Forgets the pivots of the prompt before. options.policy is kVerticalSlash or kShare.
  void StartPrompt(int64_t num_tokens, const AttentionOptions& options);

  // Attention of one layer, layers ascending. `attention` describes the whole prompt's q, k, v and
  // out, without work. Returns when it is on its way; `report` gets what an audit finds.
  //
  // Before, the host waits once for the device, to decide by the estimate, while the device goes on
  // to the vertical-slash sets; and once more for every batch of new pivots. Not at all where no
  // head of the layer can share. The decisions take a few arrays of [num_heads] from the heap.
  absl::Status Attend(int layer, const kernels::AttentionParams& attention, LayerReport* report);

  // Waits for the attention of the last Attend, and fills the report's head counts, density, and
  // the times of attention and of patterns.
  absl::Status Report(LayerReport* report);

  // Of the last Report.
  const PatternStages& stages() const { return stages_; }

 private:
  PatternSharing(Device* device, const ModelConfig* config, const HeadClusters* clusters,
                 int block_tokens)
      : device_(*device), config_(*config), clusters_(*clusters), block_tokens_(block_tokens) {}

  absl::Status Allocate(int64_t max_tokens);

  // The stages of Attend, in order.
  absl::Status Prepare(const kernels::AttentionParams& attention);
  absl::Status Decide(int layer, const kernels::AttentionParams& attention);
  void AssignWork();
  absl::Status AttendSparse(int layer, const kernels::AttentionParams& attention,
                            LayerReport* report);
  absl::Status DownloadForReport();

  absl::Status SelectSets();
  absl::Status AttendPivots(const kernels::AttentionParams& attention,
                            absl::Span<const int> pivots);
  absl::Status MeasurePivots(int layer, absl::Span<const int> pivots);
  // Recall of what is about to run.
  absl::Status Audit(int layer, const kernels::AttentionParams& attention, LayerReport* report);
  absl::Status MeasureTimes(LayerReport* report);

  // Figures are measured into numbered slots, 2 H of them, and read back together.
  absl::Status Measure(const float* block_mass, const uint32_t* pattern, int slot);
  absl::Status DownloadFigures();
  PatternFigures Figures(int slot) const;
  static constexpr int64_t kFiguresPerHead = 5;
  int MassSlot(int slot) const { return slot; }
  int BlocksSlot(int slot) const { return 2 * config_.num_heads + slot; }
  int VerticalSlashSlot(int head) const { return 4 * config_.num_heads + head; }

  int64_t row_words() const { return kernels::PatternWords(num_blocks_); }
  int64_t pattern_words() const { return num_blocks_ * row_words(); }
  uint32_t* VerticalSlashPattern(int head) const {
    return vertical_slash_patterns_.as<uint32_t>() + head * pattern_words();
  }
  uint32_t* PivotPattern(int cluster) const {
    return pivot_patterns_.as<uint32_t>() + cluster * pattern_words();
  }
  float* PivotMass(int64_t place) const {
    return pivot_mass_.as<float>() + place * num_blocks_ * num_blocks_;
  }
  absl::Span<const float> EstimateOf(int head) const {
    return {estimate_.as<float>() + head * num_blocks_, static_cast<size_t>(num_blocks_)};
  }
  absl::Span<const uint32_t> HostLastRow(int place) const {
    return {last_rows_host_.as<uint32_t>() + place * row_words(), static_cast<size_t>(row_words())};
  }

  Device& device_;
  const ModelConfig& config_;
  const HeadClusters& clusters_;
  const int block_tokens_;

  // Device memory; H heads, n blocks, W words of a row.
  std::unique_ptr<HeadEstimate> head_estimate_;
  DeviceBuffer last_rows_;                // [H, W]
  DeviceBuffer vertical_slash_patterns_;  // [H, n, W]
  DeviceBuffer pivot_patterns_;           // [num_clusters, n, W]
  DeviceBuffer pivot_mass_;               // [as many as fit, n, n] fp32
  // [2 H] mass as double and [2 H] blocks of measured patterns, then [H] blocks of the heads'
  // vertical-slash patterns, both int64.
  DeviceBuffer figures_;
  std::unique_ptr<RecallAudit> audit_;

  // The prompt.
  AttentionOptions options_;
  int64_t num_tokens_ = 0;
  int64_t num_blocks_ = 0;
  std::vector<ClusterPivot> pivots_;  // [num_clusters]
  std::vector<int> no_clusters_;      // [H], for policy vertical_slash

  // The layer.
  absl::Span<const int> cluster_of_;     // [H]
  bool may_share_ = false;               // some head is in a cluster, and clusters may share
  std::vector<HeadRole> roles_;          // [H]
  std::vector<kernels::HeadWork> work_;  // of the launch being prepared
  PatternStages stages_;

  // Copies in host memory.
  DeviceBuffer estimate_;        // of block_estimate_
  DeviceBuffer last_rows_host_;  // of last_rows_; at first, of the new pivots' last rows
  DeviceBuffer figures_host_;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_PATTERN_SHARING_H_
