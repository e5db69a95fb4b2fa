// The block-sparse attention with which pattern sharing is compared. It serves evaluations: nothing
// here is fast or safe enough to be a server's default.
//
//   baseline_query_aware  FlexPrefill (Lai et al., arXiv 2502.20766). The block means of queries
//                         and keys predict the block mass (PooledMassParams of
//                         kernels/pattern.h). If the prediction for the last row is nearer than tau
//                         to the head's true estimate, every row takes the smallest set of blocks
//                         that holds gamma of its predicted mass, with block 0 and the diagonal.
//                         The other heads are left to vertical-slash. The article's tau is 0.1;
//                         with tau 1 every head follows the prediction.
//   baseline_random       Blocks at random, `density` of each row, with block 0 and the diagonal.
//                         Any choice of blocks has to beat this.
#ifndef PREFILLD_MODEL_SPARSE_BASELINE_ATTENTION_H_
#define PREFILLD_MODEL_SPARSE_BASELINE_ATTENTION_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "model/checkpoint/config.h"
#include "model/device/device.h"
#include "model/sparse/attention_options.h"
#include "model/sparse/attention_strategy.h"
#include "model/sparse/head_estimate.h"
#include "model/sparse/recall_audit.h"

namespace prefilld::model {

// Writes a causal pattern of [num_blocks, PatternWords(num_blocks)]: in every row `density` of its
// blocks, rounded, but at least block 0 and the diagonal; the others at random. Returns how many
// blocks it has. The same seed gives the same pattern.
int64_t RandomPattern(int64_t num_blocks, float density, uint64_t seed,
                      absl::Span<uint32_t> pattern);

// Memory of one layer of a baseline, common to all prompts and allocated for the longest one. H is
// the number of heads, n of blocks, W of words of a pattern row. Not thread-safe.
struct BaselineWorkspace {
  // All parameters are borrowed and must outlive the workspace.
  static absl::StatusOr<std::unique_ptr<BaselineWorkspace>> Create(Device* device,
                                                                   const ModelConfig* config,
                                                                   int64_t max_tokens,
                                                                   int block_tokens);

  BaselineWorkspace(Device* device, const ModelConfig* config, int block_tokens)
      : device(*device), config(*config), block_tokens(block_tokens) {}

  Device& device;
  const ModelConfig& config;
  const int block_tokens;

  // Device memory.
  std::unique_ptr<HeadEstimate> head_estimate;
  DeviceBuffer patterns;     // [H, n, W]
  DeviceBuffer block_means;  // [2, n, head_dim] fp32
  DeviceBuffer block_mass;   // [n, n] fp32, of one head
  DeviceBuffer head_blocks;  // [H] int64
  std::unique_ptr<RecallAudit> audit;

  // Host memory.
  std::vector<PatternSource> sources;   // [H]
  std::vector<int64_t> blocks;          // [H]: what each head computes
  std::vector<kernels::HeadWork> work;  // [H]
  std::vector<float> estimate;          // [H, n]
  std::vector<float> predicted;         // [n]: of the last row
  std::vector<uint32_t> random;         // [n, W]
};

// Serves the baseline policies. Nothing of a layer is needed by the next one, so a prompt's state
// is its options alone. Times are taken by the host's clock, for which Attend waits for the device
// before and after. Not thread-safe.
class BaselineAttention final : public AttentionStrategy {
 public:
  // The workspace is borrowed and must outlive this.
  explicit BaselineAttention(BaselineWorkspace* workspace)
      : scratch_(*workspace), device_(workspace->device), config_(workspace->config) {}

  void StartPrompt(int64_t num_tokens, const AttentionOptions& options) override;
  // Fills in the whole report.
  absl::Status Attend(int layer, const kernels::AttentionParams& attention,
                      LayerReport* report) override;
  absl::Status Report(LayerReport*) override { return absl::OkStatus(); }

 private:
  // These fill patterns, sources and blocks of the workspace.
  absl::Status ChooseAtRandom(int layer);
  absl::Status ChooseByQuery(const kernels::AttentionParams& attention);
  absl::Status ChooseVerticalSlash(const kernels::AttentionParams& attention);
  absl::Status ChooseByBlockMeans(const kernels::AttentionParams& attention, int head);

  absl::Status Audit(int layer, const kernels::AttentionParams& attention, LayerReport* report);
  void Summarize(LayerReport* report) const;

  int64_t row_words() const { return kernels::PatternWords(num_blocks_); }
  uint32_t* Pattern(int head) const {
    return scratch_.patterns.as<uint32_t>() + head * num_blocks_ * row_words();
  }

  BaselineWorkspace& scratch_;
  Device& device_;
  const ModelConfig& config_;

  // The prompt.
  AttentionOptions options_;
  int64_t num_tokens_ = 0;
  int64_t num_blocks_ = 0;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_BASELINE_ATTENTION_H_
