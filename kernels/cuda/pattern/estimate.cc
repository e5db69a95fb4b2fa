#include "kernels/cuda/pattern/sm80/estimate.h"
#include "kernels/cuda/kernel_path.h"
#include "kernels/cuda/pattern.h"
#include "kernels/cuda/pattern/sm90/estimate.h"

namespace prefilld::kernels::cuda {
namespace {

bool IsSupported(const EstimateParams& params) {
  return (params.head_dim == 64 || params.head_dim == 128) &&
         (params.block_tokens == 64 || params.block_tokens == 128) && params.num_kv_heads > 0 &&
         params.num_heads % params.num_kv_heads == 0 && params.num_queries > 0 &&
         params.num_queries <= params.block_tokens && params.num_queries <= params.num_keys &&
         params.scratch != nullptr;
}

}  // namespace

cudaError_t LaunchEstimate(const EstimateParams& params, cudaStream_t stream, KernelPath path) {
  if (!IsSupported(params)) return cudaErrorInvalidValue;
  GpuTraits gpu;
  if (cudaError_t error = CurrentGpu(&gpu); error != cudaSuccess) return error;
  const auto chosen = ChoosePath(path, gpu, sm90::Supports(params));
  if (!chosen) return cudaErrorInvalidValue;
  return *chosen == KernelPath::kHopper ? sm90::LaunchEstimate(params, gpu.num_sms, stream)
                                        : sm80::LaunchEstimate(params, stream);
}

}  // namespace prefilld::kernels::cuda
