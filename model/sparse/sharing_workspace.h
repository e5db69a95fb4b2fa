// Memory of one layer of pattern sharing, common to all prompts.
#ifndef PREFILLD_MODEL_SPARSE_SHARING_WORKSPACE_H_
#define PREFILLD_MODEL_SPARSE_SHARING_WORKSPACE_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/checkpoint/config.h"
#include "model/device/device.h"
#include "model/sparse/head_clusters.h"
#include "model/sparse/head_estimate.h"
#include "model/sparse/recall_audit.h"

namespace prefilld::model {

// Scratch of PatternSharing: nothing here is read again once a layer's report is made. Create
// allocates it for the longest prompt. With H heads, n blocks and W words of a pattern row, that is
// H * n * W * 4 bytes for patterns (H times 8.4 MB at 1M tokens and 128-token blocks) and n * n * 4
// for each pivot whose block mass is held at a time. Not thread-safe.
struct SharingWorkspace {
  // All parameters are borrowed and must outlive the workspace.
  static absl::StatusOr<std::unique_ptr<SharingWorkspace>> Create(Device* device,
                                                                  const ModelConfig* config,
                                                                  const HeadClusters* clusters,
                                                                  int64_t max_tokens,
                                                                  int block_tokens);

  // Figures are measured into numbered slots, 2 H of them, and read back together: mass as double
  // and blocks as int64. Behind them stand H counts of blocks, int64, of the heads' vertical-slash
  // patterns.
  static constexpr int64_t kFiguresPerHead = 5;
  int MassSlot(int slot) const { return slot; }
  int BlocksSlot(int slot) const { return 2 * config.num_heads + slot; }
  int VerticalSlashSlot(int head) const { return 4 * config.num_heads + head; }

  SharingWorkspace(Device* device, const ModelConfig* config, const HeadClusters* clusters,
                   int block_tokens)
      : device(*device), config(*config), clusters(*clusters), block_tokens(block_tokens) {}

  Device& device;
  const ModelConfig& config;
  const HeadClusters& clusters;
  const int block_tokens;

  // Device memory.
  std::unique_ptr<HeadEstimate> head_estimate;
  DeviceBuffer last_rows;                // [H, W]: blocks that each head's own estimate found
  DeviceBuffer vertical_slash_patterns;  // [H, n, W]
  DeviceBuffer pivot_mass;               // [as many as fit, n, n] fp32
  DeviceBuffer figures;                  // [kFiguresPerHead * H] of 8 bytes
  std::unique_ptr<RecallAudit> audit;

  // Copies in host memory.
  DeviceBuffer block_mass_host;  // [H, n] fp32: head_estimate->block_mass()
  DeviceBuffer last_rows_host;  // last_rows; before that, the last rows of the new pivots' patterns
  DeviceBuffer figures_host;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_SHARING_WORKSPACE_H_
