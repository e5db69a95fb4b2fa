// Gate, up and SwiGLU in one kernel on Hopper GPUs: wgmma on tiles that bulk tensor copies bring,
// warps specialised in copying or computing, CTAs that persist, SwiGLU on the accumulators. The
// op's contract is GatedLinear in kernels/layer_ops.h.
#ifndef PREFILLD_KERNELS_CUDA_GATED_LINEAR_SM90_FUSED_H_
#define PREFILLD_KERNELS_CUDA_GATED_LINEAR_SM90_FUSED_H_

#include <cuda_runtime_api.h>

#include "kernels/layer_ops.h"

namespace prefilld::kernels::cuda::sm90 {

// Whether the kernel can compute these params: in_features and intermediate are multiples of 8, and
// x, w and y are aligned to 16 bytes. It says nothing about the GPU.
bool Supports(const GatedLinearParams& params);

// Computes the op on a GPU of `num_sms`. It does not touch gate_up.
cudaError_t LaunchGatedLinear(const GatedLinearParams& params, int num_sms, cudaStream_t stream);

}  // namespace prefilld::kernels::cuda::sm90

#endif  // PREFILLD_KERNELS_CUDA_GATED_LINEAR_SM90_FUSED_H_
