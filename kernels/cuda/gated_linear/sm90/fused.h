// Hopper path of GatedLinear (kernels/layer_ops.h): wgmma, bulk tensor copies, warp-specialised,
// persistent, SwiGLU on the accumulators.
#ifndef PREFILLD_KERNELS_CUDA_GATED_LINEAR_SM90_FUSED_H_
#define PREFILLD_KERNELS_CUDA_GATED_LINEAR_SM90_FUSED_H_

#include <cuda_runtime_api.h>

#include "kernels/layer_ops.h"

namespace prefilld::kernels::cuda::sm90 {

// Whether the kernel computes these params (it says nothing about the GPU): in_features and
// intermediate are multiples of 8 and x, w and y aligned to 16 bytes.
bool Supports(const GatedLinearParams& params);

// Does not touch gate_up.
cudaError_t LaunchGatedLinear(const GatedLinearParams& params, int num_sms, cudaStream_t stream);

}  // namespace prefilld::kernels::cuda::sm90

#endif  // PREFILLD_KERNELS_CUDA_GATED_LINEAR_SM90_FUSED_H_
