// The estimate by mma.sync, for every GPU from sm_80 on; the op's contract is kernels/pattern.h.
#ifndef PREFILLD_KERNELS_CUDA_PATTERN_SM80_ESTIMATE_H_
#define PREFILLD_KERNELS_CUDA_PATTERN_SM80_ESTIMATE_H_

#include <cuda_runtime_api.h>

#include "kernels/pattern.h"

namespace prefilld::kernels::cuda::sm80 {

// head_dim is 64 or 128, block_tokens 64 or 128.
cudaError_t LaunchEstimate(const EstimateParams& params, cudaStream_t stream);

}  // namespace prefilld::kernels::cuda::sm80

#endif  // PREFILLD_KERNELS_CUDA_PATTERN_SM80_ESTIMATE_H_
