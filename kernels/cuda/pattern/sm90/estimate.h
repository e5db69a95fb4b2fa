// The estimate on Hopper GPUs: wgmma on tiles that bulk tensor copies bring, warps specialised in
// copying or computing, CTAs that persist. The op's contract is kernels/pattern.h.
#ifndef PREFILLD_KERNELS_CUDA_PATTERN_SM90_ESTIMATE_H_
#define PREFILLD_KERNELS_CUDA_PATTERN_SM90_ESTIMATE_H_

#include <cuda_runtime_api.h>

#include "kernels/pattern.h"

namespace prefilld::kernels::cuda::sm90 {

// Whether the kernels are built for this shape: head_dim 64 or 128, block_tokens 128, and K aligned
// as bulk copies need it. It says nothing about the GPU.
bool Supports(const EstimateParams& params);

cudaError_t LaunchEstimate(const EstimateParams& params, int num_sms, cudaStream_t stream);

}  // namespace prefilld::kernels::cuda::sm90

#endif  // PREFILLD_KERNELS_CUDA_PATTERN_SM90_ESTIMATE_H_
