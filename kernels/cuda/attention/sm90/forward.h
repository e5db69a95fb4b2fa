// Attention on Hopper GPUs; the op's contract is kernels/attention.h.
//
// The kernel multiplies by wgmma on tiles that bulk tensor copies bring, with warps specialised in
// copying or computing, and its CTAs persist: each takes one tile after another. It serves head_dim
// 64 and 128 with block_tokens 128, in bf16. A query tile is one query block of one head. Its key
// blocks come from its row of the pattern, so dense and block-sparse heads share the main loop.
#ifndef PREFILLD_KERNELS_CUDA_ATTENTION_SM90_FORWARD_H_
#define PREFILLD_KERNELS_CUDA_ATTENTION_SM90_FORWARD_H_

#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/attention.h"

namespace prefilld::kernels::cuda::sm90 {

// Whether the kernels are built for this shape. It says nothing about the GPU.
bool Supports(const AttentionParams& params);

// The bytes of device memory that LaunchAttention needs for these params on a GPU of `num_sms`.
size_t AttentionScratchBytes(const AttentionParams& params, int num_sms);

// Computes attention. Other work on the device must not use `scratch` until the kernels have
// finished.
cudaError_t LaunchAttention(const AttentionParams& params, void* scratch, int num_sms,
                            cudaStream_t stream);

}  // namespace prefilld::kernels::cuda::sm90

#endif  // PREFILLD_KERNELS_CUDA_ATTENTION_SM90_FORWARD_H_
