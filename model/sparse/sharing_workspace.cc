#include "model/sparse/sharing_workspace.h"

#include <algorithm>
#include <utility>

#include "kernels/attention.h"
#include "proto/status_macros.h"

namespace prefilld::model {
namespace {

// The block masses of several heads are held at a time if they fit into this: at lengths where one
// head does not fill the device, a launch with several does.
constexpr int64_t kBlockMassBytes = int64_t{128} << 20;

}  // namespace

absl::StatusOr<std::unique_ptr<SharingWorkspace>> SharingWorkspace::Create(
    Device* device, const ModelConfig* config, const HeadClusters* clusters, int64_t max_tokens,
    int block_tokens, LayerPauses* pauses) {
  auto workspace =
      std::make_unique<SharingWorkspace>(device, config, clusters, block_tokens, pauses);
  const int64_t heads = config->num_heads;
  const int64_t blocks = kernels::CeilDiv(max_tokens, block_tokens);
  const int64_t words = kernels::PatternWords(blocks);
  const int64_t mass_bytes = blocks * blocks * int64_t{sizeof(float)};
  const int64_t all_mass_bytes =
      std::max(mass_bytes, std::min(mass_bytes * heads, kBlockMassBytes));
  const std::pair<DeviceBuffer&, int64_t> wanted[] = {
      {workspace->last_rows, heads * words * int64_t{sizeof(uint32_t)}},
      {workspace->own_patterns, heads * blocks * words * int64_t{sizeof(uint32_t)}},
      {workspace->pivot_vertical_slash,
       clusters->empty() ? 0 : blocks * words * int64_t{sizeof(uint32_t)}},
      {workspace->block_mass, all_mass_bytes},
      {workspace->figures, kFiguresPerHead * heads * int64_t{sizeof(int64_t)}},
  };
  for (const auto& [buffer, bytes] : wanted) {
    if (bytes == 0) continue;
    PREFILLD_ASSIGN_OR_RETURN(buffer, device->Allocate(static_cast<size_t>(bytes)));
  }
  PREFILLD_ASSIGN_OR_RETURN(
      workspace->head_estimate,
      HeadEstimate::Create(device, config->num_heads, max_tokens, block_tokens));
  const std::pair<DeviceBuffer&, const DeviceBuffer&> host_copies[] = {
      {workspace->block_mass_host, workspace->head_estimate->block_mass()},
      {workspace->last_rows_host, workspace->last_rows},
      {workspace->pivot_rows_host, workspace->last_rows},
      {workspace->figures_host, workspace->figures}};
  for (const auto& [copy, original] : host_copies) {
    PREFILLD_ASSIGN_OR_RETURN(copy, device->AllocateStaging(original.bytes()));
  }
  PREFILLD_ASSIGN_OR_RETURN(workspace->audit, RecallAudit::Create(device, config->num_heads));
  return workspace;
}

}  // namespace prefilld::model
