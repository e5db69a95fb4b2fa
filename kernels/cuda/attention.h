// Attention on CUDA; the ops' contract is kernels/attention.h.
#ifndef PREFILLD_KERNELS_CUDA_ATTENTION_H_
#define PREFILLD_KERNELS_CUDA_ATTENTION_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/kernel_path.h"

namespace prefilld::kernels::cuda {

// The bytes of device memory that LaunchAttention needs on the current device; may be 0. On Hopper
// GPUs attention/sm90 computes block_tokens 128, attention/sm80 the rest.
int64_t AttentionScratchBytes(const AttentionParams& params,
                              KernelPath path = KernelPath::kFastest);

// The same for any work on the heads of this shape, with or without block mass. A shorter prompt
// does not need more.
int64_t MaxAttentionScratchBytes(const AttentionParams& shape, bool block_mass);

// Computes attention. `scratch` is used until the launched kernels have finished. Returns
// cudaErrorInvalidValue where
// - no kernel is built for the shape (head_dim is 64 or 128, block_tokens 64 or 128);
// - a head with a pattern is to report block mass;
// - scratch is needed and missing;
// - kHopper is asked for, but not possible.
cudaError_t LaunchAttention(const AttentionParams& params, void* scratch, cudaStream_t stream,
                            KernelPath path = KernelPath::kFastest);

// Computes attention over a paged cache. head_dim is 64 or 128.
cudaError_t LaunchPagedAttention(const PagedAttentionParams& params, cudaStream_t stream);

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_ATTENTION_H_
