// Hopper path of kernels/attention.h: wgmma, bulk tensor copies, warp-specialised, persistent.
//
// Serves head_dim 64 and 128 with block_tokens 128, bf16. One query tile is one query block of one
// head; the key blocks of a tile come from its pattern's row, so dense and block-sparse heads share
// the mainloop.
#ifndef PREFILLD_KERNELS_CUDA_ATTENTION_SM90_FORWARD_H_
#define PREFILLD_KERNELS_CUDA_ATTENTION_SM90_FORWARD_H_

#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/attention.h"

namespace prefilld::kernels::cuda::sm90 {

// Heads named by one launch; a call with more is split.
inline constexpr int kMaxWork = 64;

// Whether this path computes these shapes (it says nothing about the GPU).
bool Supports(const AttentionParams& params);

// Device scratch that LaunchAttention needs for these params on a GPU of `num_sms`.
size_t AttentionScratchBytes(const AttentionParams& params, int num_sms);

// `scratch` must not be used by other work on the device until the launch has finished.
cudaError_t LaunchAttention(const AttentionParams& params, void* scratch, int num_sms,
                            cudaStream_t stream);

}  // namespace prefilld::kernels::cuda::sm90

#endif  // PREFILLD_KERNELS_CUDA_ATTENTION_SM90_FORWARD_H_
