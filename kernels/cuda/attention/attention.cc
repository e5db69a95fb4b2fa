#include "kernels/cuda/attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cuda/attention/plan.h"
#include "kernels/cuda/attention/sm80/config.h"
#include "kernels/cuda/attention/sm90/forward.h"
#include "kernels/cuda/kernel_path.h"

namespace prefilld::kernels::cuda {
namespace {

sm80::KernelParams MakeKernelParams(const AttentionParams& params, void* scratch) {
  sm80::KernelParams kernel_params;
  kernel_params.q = static_cast<const __nv_bfloat16*>(params.q);
  kernel_params.k = static_cast<const __nv_bfloat16*>(params.k);
  kernel_params.v = static_cast<const __nv_bfloat16*>(params.v);
  kernel_params.out = static_cast<__nv_bfloat16*>(params.out);
  kernel_params.block_log_sums = static_cast<float*>(scratch);
  kernel_params.num_queries = params.num_queries;
  kernel_params.num_keys = params.num_keys;
  kernel_params.kv_head_stride = params.kv_head_stride;
  kernel_params.num_query_blocks = static_cast<int>(NumQueryBlocks(params));
  kernel_params.row_key_blocks = static_cast<int>(RowKeyBlocks(params));
  kernel_params.num_heads = params.num_heads;
  kernel_params.heads_per_kv_head = params.num_heads / params.num_kv_heads;
  kernel_params.scale_log2 = params.scale * static_cast<float>(M_LOG2E);
  return kernel_params;
}

template <int kHeadDim, int kBlockTokens>
cudaError_t LaunchPortable(const sm80::KernelParams& params, int64_t grid, cudaStream_t stream) {
  return params.group.block_mass
             ? sm80::LaunchForward<sm80::Config<kHeadDim, kBlockTokens, true>>(params, grid, stream)
             : sm80::LaunchForward<sm80::Config<kHeadDim, kBlockTokens, false>>(params, grid,
                                                                                stream);
}

int64_t PortableScratchBytes(const AttentionParams& params, int num_sms) {
  HeadGroups groups(params);
  HeadGroup group;
  int64_t ctas = 0;
  while (groups.Next(&group) && group.block_mass) {
    ctas = std::max(ctas, BlockMassCtas(params, group.num_heads, num_sms));
  }
  return ctas * BlockMassFloatsPerCta(params) * static_cast<int64_t>(sizeof(float));
}

cudaError_t LaunchPortableGroups(const AttentionParams& params, void* scratch, int num_sms,
                                 cudaStream_t stream) {
  sm80::KernelParams kernel_params = MakeKernelParams(params, scratch);
  HeadGroups groups(params);
  while (groups.Next(&kernel_params.group)) {
    const HeadGroup& group = kernel_params.group;
    if (group.block_mass && scratch == nullptr) return cudaErrorInvalidValue;
    kernel_params.num_tiles = NumQueryBlocks(params) * group.num_heads;
    const int64_t grid = group.block_mass ? BlockMassCtas(params, group.num_heads, num_sms)
                                          : kernel_params.num_tiles;
    const bool wide = params.head_dim == 128;
    const bool coarse = params.block_tokens == 128;
    const auto launch = wide ? (coarse ? LaunchPortable<128, 128> : LaunchPortable<128, 64>)
                             : (coarse ? LaunchPortable<64, 128> : LaunchPortable<64, 64>);
    if (cudaError_t error = launch(kernel_params, grid, stream); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

int64_t AttentionScratchBytes(const AttentionParams& params, KernelPath path) {
  GpuTraits gpu;
  if (!IsSupported(params) || CurrentGpu(&gpu) != cudaSuccess) return 0;
  const auto chosen = ChoosePath(path, gpu, sm90::Supports(params));
  if (!chosen) return 0;
  return *chosen == KernelPath::kHopper
             ? static_cast<int64_t>(sm90::AttentionScratchBytes(params, gpu.num_sms))
             : PortableScratchBytes(params, gpu.num_sms);
}

int64_t MaxAttentionScratchBytes(const AttentionParams& shape, bool block_mass) {
  float mass;  // its address stands for block mass that is asked for; nothing is written
  std::vector<HeadWork> work(static_cast<size_t>(shape.num_heads));
  for (int head = 0; head < shape.num_heads; ++head) {
    work[static_cast<size_t>(head)] = {.head = head, .block_mass = block_mass ? &mass : nullptr};
  }
  AttentionParams all_heads = shape;
  all_heads.work = work.data();
  all_heads.num_work = shape.num_heads;
  return AttentionScratchBytes(all_heads);
}

cudaError_t LaunchAttention(const AttentionParams& params, void* scratch, cudaStream_t stream,
                            KernelPath path) {
  if (!IsSupported(params)) return cudaErrorInvalidValue;
  GpuTraits gpu;
  if (cudaError_t error = CurrentGpu(&gpu); error != cudaSuccess) return error;
  const auto chosen = ChoosePath(path, gpu, sm90::Supports(params));
  if (!chosen) return cudaErrorInvalidValue;
  if (*chosen == KernelPath::kPortable) {
    return LaunchPortableGroups(params, scratch, gpu.num_sms, stream);
  }
  if (scratch == nullptr) return cudaErrorInvalidValue;
  return sm90::LaunchAttention(params, scratch, gpu.num_sms, stream);
}

}  // namespace prefilld::kernels::cuda
