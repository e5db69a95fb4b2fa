#include "kernels/cuda/pattern/sm80/estimate.h"
#include "kernels/cuda/attention.h"
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

cudaError_t LaunchEstimate(const EstimateParams& params, cudaStream_t stream, AttentionPath path) {
  if (!IsSupported(params)) return cudaErrorInvalidValue;
  if (path == AttentionPath::kPortable || !sm90::Supports(params)) {
    return sm80::LaunchEstimate(params, stream);
  }
  int device = 0;
  int major = 0;
  int num_sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return error;
  // wgmma exists on compute capability 9 alone.
  return major == 9 ? sm90::LaunchEstimate(params, num_sms, stream)
                    : sm80::LaunchEstimate(params, stream);
}

}  // namespace prefilld::kernels::cuda
