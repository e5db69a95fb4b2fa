#include "kernels/cuda/antidiagonal_scores.h"

#include <algorithm>
#include <cmath>

#include "kernels/cuda/antidiagonal/plan.h"
#include "kernels/cuda/antidiagonal/sm80/scores.h"
#include "kernels/cuda/antidiagonal/sm90/scores.h"

namespace prefilld::kernels::cuda {
namespace {

// Describes the call, but for its heads.
FoldLaunch MakeLaunch(const AntidiagonalScoresParams& p, void* scratch) {
  const AntidiagonalFolds folds(p);
  FoldLaunch launch{};
  launch.weights = static_cast<float*>(scratch);
  launch.scale_log2 = p.scale / static_cast<float>(p.stride) * static_cast<float>(M_LOG2E);
  launch.heads_per_kv_head = p.num_heads / p.num_kv_heads;
  launch.stride = p.stride;
  launch.num_folds = static_cast<int>(folds.num_folds);
  launch.first_query_fold = static_cast<int>(folds.first_query_fold);
  launch.num_key_blocks = static_cast<int>(folds.num_key_blocks);
  launch.first_query_block = static_cast<int>(folds.first_query_block);
  launch.num_query_blocks = static_cast<int>(folds.num_query_blocks);
  launch.weight_blocks = static_cast<int>(WeightBlocks(p));
  launch.last_visible = static_cast<int>(folds.Visible(folds.num_folds - 1));
  return launch;
}

}  // namespace

int64_t AntidiagonalScratchBytes(const AntidiagonalScoresParams& params) {
  GpuTraits gpu;
  if (!IsSupported(params) || CurrentGpu(&gpu) != cudaSuccess) return 0;
  return int64_t{gpu.num_sms} * kGroupsPerSm * WeightBlocks(params) * kGroupFolds *
         static_cast<int64_t>(sizeof(float));
}

cudaError_t LaunchAntidiagonalScores(const AntidiagonalScoresParams& params, void* scratch,
                                     cudaStream_t stream, KernelPath path) {
  if (!IsSupported(params) || scratch == nullptr) return cudaErrorInvalidValue;
  GpuTraits gpu;
  if (cudaError_t error = CurrentGpu(&gpu); error != cudaSuccess) return error;
  const auto chosen = ChoosePath(path, gpu, sm90::Supports(params));
  if (!chosen) return cudaErrorInvalidValue;
  FoldLaunch launch = MakeLaunch(params, scratch);
  const int64_t head_mass = int64_t{launch.num_query_blocks} * launch.num_key_blocks;
  for (int first = 0; first < params.num_scored; first += kMaxScoredHeads) {
    launch.num_scored = std::min(kMaxScoredHeads, params.num_scored - first);
    std::copy_n(params.heads + first, launch.num_scored, launch.heads);
    launch.block_mass = params.block_mass + first * head_mass;
    const cudaError_t error =
        *chosen == KernelPath::kHopper
            ? sm90::LaunchAntidiagonalScores(params, launch, gpu.num_sms, stream)
            : sm80::LaunchAntidiagonalScores(params, launch, gpu.num_sms, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace prefilld::kernels::cuda
