// Sparse attention of one prompt by SharePrefill (Peng et al., "Accelerating Prefilling for
// Long-Context LLMs via Sparse Pattern Sharing", arXiv 2505.19578), online part.
//
// Two observations carry it: the attention patterns of many heads are alike, and which heads are
// alike is a property of the model (model/sparse/head_clusters.h) though the patterns change
// with the prompt. So, prompt by prompt and layer by layer:
//   1 Estimate  The last block of queries yields mass per key block, per column, per diagonal.
//   2 Decide    The first head of a cluster becomes its pivot; heads near enough to their
//               pivot share; all others are scored, each for itself
//               (model/sparse/sharing_decision.h).
//   3 Pivot     Dense attention that also yields the exact mass of every block. Per row of blocks
//               the smallest set that holds gamma of it, with block 0 and the diagonal, is the
//               cluster's pattern for the rest of the prompt.
//   4 Coverage  What the pivot's own vertical-slash set holds of its exact mass, and what it costs
//               beside the pattern, says whether the cluster gains by sharing. It is computed on a
//               set, so no block counts twice.
//   5 Score     Each of the other heads gets the blocks that antidiagonal scores of all its
//               queries choose, and the columns and diagonals that its last queries look at
//               (model/sparse/scored_patterns.h). In the paper they get the latter alone.
//   6 Attend    Shared heads compute the pivot's pattern plus the blocks of the last row that
//               their own estimate found; the others compute their own pattern.
// A cluster may have a scored pivot instead (SharingForm): its first head is scored, and those near
// enough take that head's pattern and are not scored. What they share is the cost of finding it.
// Without clusters every head is scored. Policy vertical_slash takes steps 1 and 6 alone, with the
// vertical-slash set of every head.
#ifndef PREFILLD_MODEL_SPARSE_PATTERN_SHARING_H_
#define PREFILLD_MODEL_SPARSE_PATTERN_SHARING_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "model/sparse/attention_options.h"
#include "model/sparse/attention_strategy.h"
#include "model/sparse/scored_patterns.h"
#include "model/sparse/sharing_decision.h"
#include "model/sparse/sharing_workspace.h"

namespace prefilld::model {

// The parts of a layer's time, in microseconds by the device's clock; host_us by the host's.
struct PatternStages {
  double estimate_us = 0.0;
  // The sets of the last queries, the blocks of the last row, scores of heads that cannot share.
  double select_us = 0.0;
  // The time from there until the sparse heads can run: the rest of the host's decisions, the
  // measuring of pivots, and the scores of heads that could have shared.
  double decide_us = 0.0;
  double host_us = 0.0;    // what the host computes to decide, most of it beside select_us
  double pivots_us = 0.0;  // attention of pivots
};

// Serves the policies share and vertical_slash. Holds the pivots of one prompt and their patterns;
// everything else lies in the workspace. With n blocks and W words of a pattern row the patterns
// take num_clusters * n * W * 4 bytes of device memory (8.4 MB a cluster at 1M tokens and 128-token
// blocks), allocated by Create. Every shared cluster keeps at most one pivot. Not thread-safe.
class PatternSharing final : public AttentionStrategy {
 public:
  static constexpr int kNumMarks = 8;  // uses marks 0 .. of the device, whatever the prompt

  // Creates the state for prompts of at most max_tokens, for which the workspace must have room.
  // The workspace is borrowed and must outlive this.
  static absl::StatusOr<std::unique_ptr<PatternSharing>> Create(SharingWorkspace* workspace,
                                                                int64_t max_tokens);

  void StartPrompt(int64_t num_tokens, const AttentionOptions& options) override;

  // The host waits once for the device, to decide by the estimate while the device computes the
  // sets of the last queries, and once more for every batch of new pivots. It does not wait if no
  // head of the layer can share. The decisions allocate a few arrays of [num_heads]. Heads of a
  // long prompt are scored, become pivots and attend in groups, and their attention is divided
  // further (attention_parts.h), with a pause of the workspace behind each part.
  absl::Status Attend(int layer, const kernels::AttentionParams& attention,
                      LayerReport* report) override;
  absl::Status Report(LayerReport* report) override;

  const PatternStages& stages() const { return stages_; }  // as of the last Report

 private:
  explicit PatternSharing(SharingWorkspace* workspace)
      : scratch_(*workspace), device_(workspace->device), config_(workspace->config) {}

  absl::Status Allocate(int64_t max_tokens);

  // These are the stages of Attend, in order.
  absl::Status Prepare(int layer, const kernels::AttentionParams& attention);
  absl::Status Decide(int layer, const kernels::AttentionParams& attention);
  void AssignWork(int layer);
  absl::Status AttendSparse(int layer, const kernels::AttentionParams& attention,
                            LayerReport* report);
  absl::Status DownloadForReport(int layer);

  absl::Status SelectSets(int layer, const kernels::AttentionParams& attention);
  // Scores the heads whose role is kScored, of those that cannot share or of the others.
  absl::Status ScoreHeads(int layer, const kernels::AttentionParams& attention, bool can_share);
  absl::Status AttendPivots(const kernels::AttentionParams& attention,
                            absl::Span<const int> pivots);
  absl::Status MeasurePivots(absl::Span<const int> pivots);
  void KeepPivots(int layer, absl::Span<const int> pivots);
  void KeepScoredPivots(int layer, absl::Span<const int> pivots);
  // Fills in what the reports of later layers need of the scored pivots of this one.
  void CompleteScoredPivots(int layer);
  bool IsScoredPivot(int head, int layer) const {
    const int cluster = cluster_of_[head];
    return cluster != HeadClusters::kNoCluster && pivots_[cluster].scored &&
           pivots_[cluster].layer == layer && pivots_[cluster].head == head;
  }
  // Measures the recall of the patterns that are about to run.
  absl::Status Audit(int layer, const kernels::AttentionParams& attention, LayerReport* report);
  absl::Status MeasureTimes(LayerReport* report);

  absl::Status Measure(const float* block_mass, const uint32_t* pattern, int slot);
  absl::Status DownloadFigures();
  PatternFigures Figures(int slot) const;

  // Counts the blocks that the queries may attend to.
  int64_t CausalBlocks() const;
  int64_t row_words() const { return kernels::PatternWords(num_blocks_); }
  int64_t pattern_words() const { return num_query_blocks_ * row_words(); }
  uint32_t* OwnPattern(int head) const {
    return scratch_.own_patterns.as<uint32_t>() + head * pattern_words();
  }
  uint32_t* PivotPattern(int cluster) const {
    return pivot_patterns_.as<uint32_t>() + cluster * pattern_words();
  }
  float* PivotMass(int64_t place) const {
    return scratch_.block_mass.as<float>() + place * num_query_blocks_ * num_blocks_;
  }
  absl::Span<const float> EstimateOf(int head) const {
    return {scratch_.block_mass_host.as<float>() + head * num_blocks_,
            static_cast<size_t>(num_blocks_)};
  }
  absl::Span<const uint32_t> HostLastRow(int place) const {
    return {scratch_.last_rows_host.as<uint32_t>() + place * row_words(),
            static_cast<size_t>(row_words())};
  }

  SharingWorkspace& scratch_;
  Device& device_;
  const ModelConfig& config_;

  // The prompt.
  AttentionOptions options_;
  int64_t num_blocks_ = 0;
  int64_t num_query_blocks_ = 0;      // the last ones: all, unless there is a cached prefix
  std::vector<ClusterPivot> pivots_;  // [num_clusters]
  DeviceBuffer pivot_patterns_;       // [num_clusters, n, W]

  // The layer being computed; the host's part of the scratch, a few words a head.
  std::vector<int> no_clusters_;         // [num_heads], for policy vertical_slash
  absl::Span<const int> cluster_of_;     // [num_heads]
  bool may_share_ = false;               // some head is in a cluster, and clusters may share
  std::vector<HeadRole> roles_;          // [num_heads]
  std::vector<ScoredHead> to_score_;     // at most num_heads
  std::vector<kernels::HeadWork> work_;  // of the launch being prepared
  PatternStages stages_;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_PATTERN_SHARING_H_
