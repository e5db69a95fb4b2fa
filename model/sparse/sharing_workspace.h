// Memory of one layer of pattern sharing, common to all prompts.
#ifndef PREFILLD_MODEL_SPARSE_SHARING_WORKSPACE_H_
#define PREFILLD_MODEL_SPARSE_SHARING_WORKSPACE_H_

#include <algorithm>
#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/checkpoint/config.h"
#include "model/device/device.h"
#include "model/sparse/head_clusters.h"
#include "model/sparse/head_estimate.h"
#include "model/sparse/layer_pauses.h"
#include "model/sparse/recall_audit.h"

namespace prefilld::model {

// Scratch of PatternSharing: nothing here is read again once a layer's report is made. Create
// allocates it for the longest prompt. With H heads, n blocks and W words of a pattern row, that is
// (H + 1) * n * W * 4 bytes for patterns (8.4 MB a head at 1M tokens and 128-token blocks) and
// n * n * 4 for each head whose block mass is held at a time (268 MB then). Not thread-safe.
struct SharingWorkspace {
  // All parameters are borrowed and must outlive the workspace. `pauses` is reached between groups
  // of heads of a long prompt; null: nobody wants to go first.
  static absl::StatusOr<std::unique_ptr<SharingWorkspace>> Create(
      Device* device, const ModelConfig* config, const HeadClusters* clusters, int64_t max_tokens,
      int block_tokens, LayerPauses* pauses = nullptr);

  // Figures are measured into numbered slots, 2 H of them, and read back together: mass as double
  // and blocks as int64. Behind them stand H counts of blocks, int64, of the heads' own patterns.
  static constexpr int64_t kFiguresPerHead = 5;
  int MassSlot(int slot) const { return slot; }
  int BlocksSlot(int slot) const { return 2 * config.num_heads + slot; }
  int OwnBlocksSlot(int head) const { return 4 * config.num_heads + head; }

  // The number of heads whose block mass [num_query_blocks, num_key_blocks] is held at a time.
  int64_t MassesAtATime(int64_t num_query_blocks, int64_t num_key_blocks) const {
    const auto floats = static_cast<int64_t>(block_mass.bytes() / sizeof(float));
    return std::max<int64_t>(1, floats / (num_query_blocks * num_key_blocks));
  }

  absl::Status Pause(LayerStage stage) {
    return pauses == nullptr ? absl::OkStatus() : pauses->Reach(stage);
  }

  SharingWorkspace(Device* device, const ModelConfig* config, const HeadClusters* clusters,
                   int block_tokens, LayerPauses* pauses)
      : device(*device),
        config(*config),
        clusters(*clusters),
        block_tokens(block_tokens),
        pauses(pauses) {}

  Device& device;
  const ModelConfig& config;
  const HeadClusters& clusters;
  const int block_tokens;
  LayerPauses* const pauses;

  // Device memory.
  std::unique_ptr<HeadEstimate> head_estimate;
  DeviceBuffer last_rows;             // [H, W]: blocks that each head's own estimate found
  DeviceBuffer own_patterns;          // [H, n, W]: scored, or vertical-slash
  DeviceBuffer pivot_vertical_slash;  // [n, W], of the pivot that is measured
  DeviceBuffer block_mass;            // [as many as fit, n, n] fp32: of pivots, or from scores
  DeviceBuffer figures;               // [kFiguresPerHead * H] of 8 bytes
  std::unique_ptr<RecallAudit> audit;

  // Copies in host memory.
  DeviceBuffer block_mass_host;  // [H, n] fp32: head_estimate->block_mass()
  DeviceBuffer last_rows_host;  // last_rows; before that, the last rows of the new pivots' patterns
  DeviceBuffer pivot_rows_host;  // [H, W]: the last rows of new scored pivots' patterns
  DeviceBuffer figures_host;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_SHARING_WORKSPACE_H_
