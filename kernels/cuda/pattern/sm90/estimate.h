// Hopper path of the estimate: wgmma, bulk tensor copies, warp-specialised, persistent.
#ifndef PREFILLD_KERNELS_CUDA_PATTERN_SM90_ESTIMATE_H_
#define PREFILLD_KERNELS_CUDA_PATTERN_SM90_ESTIMATE_H_

#include <cuda_runtime_api.h>

#include "kernels/pattern.h"

namespace prefilld::kernels::cuda::sm90 {

// Whether this path computes these shapes: head_dim 64 or 128, block_tokens 128, K aligned as bulk
// copies need it. It says nothing about the GPU.
bool Supports(const EstimateParams& params);

cudaError_t LaunchEstimate(const EstimateParams& params, int num_sms, cudaStream_t stream);

}  // namespace prefilld::kernels::cuda::sm90

#endif  // PREFILLD_KERNELS_CUDA_PATTERN_SM90_ESTIMATE_H_
